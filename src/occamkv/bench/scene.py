"""One layer's cache at some context, made quickly: a few records are encoded once and repeated in pages of their own.

Every page has memory of its own, so a kernel reads as many bytes as in a real cache. K has planted outlier channels,
and the first token is an attention sink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from occamkv.bench.inputs import CPU, Shape, packed_of
from occamkv.cache.row import Row
from occamkv.cache.stepping import Stepping
from occamkv.cache.store import Store
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.pages import Pages
from occamkv.formats.records import from_groups, pages_of, places, to_groups, write
from occamkv.kernels import Backend, FullTokens, PackedTokens, Stepper
from occamkv.methods import Method
from occamkv.methods.crossing import Crossing, Statistics

DTYPE = torch.bfloat16
"""Of queries, residual and pins, as a model would give them."""

_TEMPLATE_PAGES = 2
_OUTLIER_CHANNELS, _OUTLIER = 2, 6.0
_SINK = 1.5


@dataclass(frozen=True)
class Tokens:
    """Random tokens of one layer in model space: q `[1, Hq, Tq, D]`, k and v `[1, H, T, D]`, float32."""

    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, device: torch.device) -> Tokens:
        """The same tokens on a device."""
        return Tokens(*(x.to(device) for x in (self.q, self.k, self.v)))


@dataclass(frozen=True)
class Scene:
    """A packed cache as one attention call sees it.

    `q` is `[B, Hq, Tq, D]` in `DTYPE` and belongs to the newest tokens. `dequantized()` returns K and V of all tokens,
    float32 `[1, H, context, D]` in model space, the same for each sequence. `new` is K and V of the newest tokens in
    model space, for `stepper`.
    """

    q: Tensor
    q_positions: Tensor
    packed: PackedTokens | None
    packed_bytes: int
    full: list[FullTokens]
    crossing: Crossing
    backend: Backend
    dequantized: Callable[[], tuple[Tensor, Tensor]]
    stepper: Stepper | None
    new: tuple[Tensor, Tensor]

    def step(self) -> Tensor:
        """Do what a layer does for one new token, again and again the same one; without a stepper only attend."""
        if self.stepper is None:
            return self.attend(self.q)
        batch = self.q.shape[0]
        held = self.stepper.residual[0]
        out = self.stepper(self.q, *self.new, due=batch * (0,), scale=None, window=None, softcap=None, sinks=None)
        for row in range(batch):
            self.stepper.residual[row] = held
        return self.crossing.leave_output(out)

    def attend(self, q: Tensor) -> Tensor:
        """Attend as `LayerCache.attend` does: q is rotated, the output is rotated back."""
        out = self.backend.attend(
            q,
            q_positions=self.q_positions,
            packed=self.packed,
            full=self.full,
            hadamard_block=self.crossing.k_block,
            balance=self.crossing.k_vector,
            rotate_output=self.crossing.v_block is not None,
        )
        return self.crossing.leave_output(out)


def random_tokens(shape: Shape, tokens: int, queries: int, *, seed: int = 0) -> Tokens:
    """Draw queries, keys and values; the first key is a sink for all queries, a few channels of K are large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    heads, head_dim = shape.kv_heads, shape.head_dim
    q, k, v = (normal(1, count, n, head_dim) for count, n in ((shape.query_heads, queries), *2 * [(heads, tokens)]))
    k[..., normal(head_dim).topk(min(_OUTLIER_CHANNELS, head_dim)).indices] *= _OUTLIER
    common = normal(1, heads, 1, head_dim)
    q += 0.5 * common.repeat_interleave(shape.query_heads // heads, dim=1)
    k[:, :, :1] += _SINK * common
    v[:, :, :1] *= 0.1
    return Tokens(q, k, v)


def statistics_of(method: Method, shape: Shape, *, seed: int = 0) -> Statistics | None:
    """Return made-up statistics for methods that need those of a model."""
    if not method.needs_model:
        return None
    generator = torch.Generator().manual_seed(seed)
    balance = 0.5 + torch.rand(shape.kv_heads, shape.head_dim, generator=generator)
    moment = torch.eye(shape.head_dim).expand(shape.kv_heads, -1, -1) + 0.1
    return Statistics(balance, moment if method.feedback else None)


def packed_scene(
    shape: Shape,
    method: Method,
    backend: Backend,
    *,
    context: int,
    queries: int = 1,
    batch: int = 1,
    device: torch.device = CPU,
    room: int = 0,
) -> Scene:
    """Build the cache that `context` tokens leave, of which the newest `queries` are those of this step.

    All sequences of a batch hold the same tokens, each in memory of its own. `room` is pages of each sequence for
    tokens of steps that a graph takes: those count on the device.

    Raises:
        UnsupportedInput: So few tokens that nothing is packed yet.
    """
    packed = packed_of(method, context, queries)
    pins = method.pinned_tokens + method.pinning.lowest
    drawn = random_tokens(shape, _TEMPLATE_PAGES * PAGE_TOKENS + context - packed, queries).to(device)
    crossing = method.crossing(drawn.k, statistics_of(method, shape))
    split = context - packed
    near_k, near_v = (x.to(DTYPE) for x in crossing.enter(drawn.k[:, :, :split], drawn.v[:, :, :split]))
    template = _template((drawn.k[:, :, split:], drawn.v[:, :, split:]), method, backend, crossing)
    store = _filled_store(method, backend, template, packed, batch)
    residual = context - queries - pins - packed
    for row in store.rows:
        row.pins, row.residual = list(range(pins)), residual
    store.pin_k[:], store.pin_v[:] = near_k[:, :, :pins], near_v[:, :, :pins]
    ring = torch.arange(packed, packed + residual, device=device) % store.residual_k.shape[2]
    newest = slice(pins + residual, None)
    for held, x in ((store.residual_k, near_k), (store.residual_v, near_v)):
        held[:, :, ring] = x[:, :, pins : newest.start]
    at = torch.arange(context - queries, context, device=device).repeat(batch, 1)
    dequantized = partial(_dequantized, backend.decode(template), crossing, (near_k, near_v), pins, packed)
    new_k, new_v = (x[:, :, newest].expand(batch, -1, -1, -1) for x in (near_k, near_v))
    full = [*store.full_tokens(), FullTokens(new_k, new_v, at)]

    def new_of(x: Tensor) -> Tensor:
        return x[:, :, newest.start : split].to(DTYPE).expand(batch, -1, -1, -1)

    whole = queries == 1 and crossing.v_signs is None
    packed_tokens, packed_bytes = store.packed_tokens(), store.pool.nbytes
    if packed_tokens is not None:  # the pool's own list grows by the room
        packed_tokens = replace(packed_tokens, slabs=[*packed_tokens.slabs], starts=[*packed_tokens.starts])
    return Scene(
        q=drawn.q.to(DTYPE).expand(batch, -1, -1, -1),
        q_positions=at,
        packed=packed_tokens,
        packed_bytes=packed_bytes,
        full=full,
        crossing=crossing,
        backend=backend,
        dequantized=dequantized,
        stepper=_stepper(store, crossing, room) if whole else None,
        new=(new_of(drawn.k), new_of(drawn.v)),
    )


def _stepper(store: Store, crossing: Crossing, room: int) -> Stepper | None:
    layer = Stepping(store, crossing).describe()
    tables = [[*table, *store.pool.allocate(room)] for table in layer.tables]
    return store.backend.stepper(replace(layer, tables=tables))


def _template(tokens: tuple[Tensor, Tensor], method: Method, backend: Backend, crossing: Crossing) -> Pages:
    """Encode whole pages of tokens once."""
    format = method.packed_format
    k, v = (to_groups(x, format.record_tokens) for x in crossing.enter(*tokens))
    records = backend.encode(
        k, v, format=format, grid=method.grid, clip=method.clip, norm=method.norm, feedback=crossing.feedback
    )
    pages = Pages.empty(
        _TEMPLATE_PAGES,
        format=format,
        kv_heads=k.shape[1],
        head_dim=k.shape[3],
        device=k.device,
        order=backend.order,
    )
    page, slot = places(pages)
    write(pages, records, page=page, slot=slot)
    return pages


def _filled_store(method: Method, backend: Backend, template: Pages, packed: int, batch: int) -> Store:
    """Return a store whose pages, each its own memory, repeat those of the template."""
    shape = (batch, template.kv_heads, template.head_dim)
    store = Store(method, backend.name, shape=shape, dtype=DTYPE, device=template.records.device)
    count = pages_of(packed)
    pages = store.pool.allocate(batch * count)
    store.rows = [Row(packed=packed, pages=pages[row * count :][:count]) for row in range(batch)]
    for mine, source in zip(store.pool.slabs[0].tensors, template.tensors, strict=True):
        for first in range(template.count):
            mine.unflatten(0, (batch, count))[:, first :: template.count] = source[first]
    return store


def _dequantized(
    template: tuple[Tensor, Tensor], crossing: Crossing, near: tuple[Tensor, Tensor], pins: int, packed: int
) -> tuple[Tensor, Tensor]:
    """Return K and V of all tokens in order of position, float32 `[1, H, context, D]` in model space."""
    far = crossing.leave(*(from_groups(x, 1) for x in template))
    copies = -(-packed // far[0].shape[2])
    made = []
    for here, there in zip(crossing.leave(*near), far, strict=True):
        middle = there.repeat(1, 1, copies, 1)[:, :, :packed]
        made.append(torch.cat((here[:, :, :pins], middle, here[:, :, pins:]), dim=2))
    return made[0], made[1]
