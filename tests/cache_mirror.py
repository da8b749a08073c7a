"""A layer cache beside the tokens that were put into it, so that every answer can be compared with float64 attention.

Unpacked tokens are exact up to one rounding: the cache holds them in cache space, in the model's dtype.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import slow_decoder
from attention_truth import allowed_error, assert_close, attention, relative_error, torch_attention
from occamkv.cache import LayerCache
from occamkv.cache.masks import Seen, read_mask
from occamkv.formats.pages import Pages
from occamkv.formats.records import Records
from occamkv.methods import Method
from some_attention import plant_outliers, some_statistics, some_tokens, space_of

COUNTERS = ("packed_reads", "dense_reads")


def leaves(thing: Any, path: str = "cache") -> dict[str, Any]:
    """Every tensor and plain value that an object holds, by the path to it."""
    if isinstance(thing, Tensor | str | int | float | None):
        return {path: thing}
    if isinstance(thing, dict):
        parts = thing.items()
    elif isinstance(thing, list | tuple | range):
        parts = enumerate(thing)
    elif dataclasses.is_dataclass(thing):
        parts = ((field.name, getattr(thing, field.name)) for field in dataclasses.fields(thing))
    else:
        parts = vars(thing).items() if hasattr(thing, "__dict__") else [("repr", repr(thing))]
    found = {}
    for name, value in parts:
        if name not in COUNTERS:
            found |= leaves(value, f"{path}.{name}")
    return found


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Raise unless two results of `leaves` hold the same paths, numbers and bits."""
    assert first.keys() == second.keys()
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, Tensor) else value == second[path]
        assert same, f"{path} differs"


def held_bytes(cache: LayerCache) -> int:
    """Bytes of all storages that a cache holds, each once.

    Not those of the statistics and of what is made of them, which tell the model, nor a description for the backend.
    """
    not_own = (".statistics", "._crossing", ".feedback", "._stepping")
    own = {path: x for path, x in leaves(cache).items() if not any(part in path for part in not_own)}
    tensors = (x for x in own.values() if isinstance(x, Tensor))
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def records_of(cache: LayerCache, row: int) -> list[Tensor]:
    """The packed bytes of one sequence in order: records `[n, H, bytes]`, norms `[n, G]`, super-scales `[n, H, 2]`."""
    store, form = cache.store, cache.store.format
    used = store.rows[row].packed // form.record_tokens
    pages = [page_of(store.pool.slabs, store.pool.starts, number) for number in store.rows[row].pages]
    if not used:
        return []
    parts = [torch.cat([slab.records[page].transpose(0, 1) for slab, page in pages])[:used]]
    if form.token_scale:
        parts.append(
            torch.cat([slab.norms[page].unflatten(0, (-1, form.record_tokens)) for slab, page in pages])[:used]
        )
    if form.metadata_bits == 8:
        parts.append(torch.cat([slab.super_scales[page].transpose(0, 1) for slab, page in pages])[:used])
    return parts


def page_of(slabs: Sequence[Pages], starts: Sequence[int], number: int) -> tuple[Pages, int]:
    """The slab of a page and its place there."""
    slab = max(index for index, start in enumerate(starts) if start <= number)
    assert number < starts[slab] + slabs[slab].count, f"page {number} lies in no slab"
    return slabs[slab], number - starts[slab]


def contents(cache: LayerCache, row: int) -> list[Tensor]:
    """All bits that one sequence holds: packed, then residual and pins in cache space, and where the pins are."""
    store, counts = cache.store, cache.store.rows[row]
    slots = torch.arange(counts.packed, counts.packed + counts.residual) % store.residual_k.shape[2]
    residual = [x[row][:, slots] for x in (store.residual_k, store.residual_v)]
    pins = [x[row][:, : counts.pinned] for x in (store.pin_k, store.pin_v)]
    return [*records_of(cache, row), *residual, *pins, torch.tensor(counts.pins, dtype=torch.int64)]


def assert_same_contents(first: list[Tensor], second: list[Tensor]) -> None:
    """Raise unless two results of `contents` are the same bits."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def left_padded(count: int, *pads: int) -> Tensor:
    """Which of `count` new slots are real, bool `[B, T]`, behind these many pads."""
    return torch.arange(count) >= torch.tensor(pads)[:, None]


class Mirror:
    """`cache` is under test; `k` and `v` hold what each sequence was given, float64 `[H, n, D]` in model space."""

    def __init__(
        self,
        form: Method,
        *,
        batch: int = 1,
        heads: int = 2,
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        outliers: float = 0.0,
        **options: Any,
    ) -> None:
        statistics = some_statistics(form, heads, head_dim)
        self.cache = LayerCache(form, statistics=statistics, **options)
        self.shape, self.dtype, self.outliers = (heads, head_dim), dtype, outliers
        self.space = space_of(form, head_dim, None if statistics is None else statistics.balance)
        self.generator = torch.Generator().manual_seed(seed)
        self.k = [torch.zeros(heads, 0, head_dim).double() for _ in range(batch)]
        self.v = list(self.k)
        self.real = torch.zeros(batch, 0, dtype=torch.bool)

    def fresh(self, count: int) -> tuple[Tensor, Tensor]:
        """New K and V `[B, H, T, D]`; about a share of `outliers` of the tokens stick out."""
        shape = (len(self.k), self.shape[0], count, self.shape[1])
        k, v = (some_tokens(*shape, generator=self.generator) for _ in range(2))
        if self.outliers:
            plant_outliers(k, v, share=self.outliers, generator=self.generator)
        return k.to(self.dtype), v.to(self.dtype)

    def put(self, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Seen | None:
        """Update the cache and note the tokens; return the mask as read. `kept`: bool `[B, T]`, False for pads."""
        batch, count = k.shape[0], k.shape[2]
        self.cache.update(k, v)
        self.real = torch.cat((self.real, torch.ones(batch, count).bool() if kept is None else kept), dim=1)
        for row in range(batch):
            there = self.real[row, -count:]
            held = self.rounded(k[row][:, there], v[row][:, there])
            self.k[row], self.v[row] = (
                torch.cat(pair, dim=1) for pair in zip((self.k[row], self.v[row]), held, strict=True)
            )
        if bool(self.real.all()):
            return None
        total = self.real.shape[1]
        causal = torch.ones(count, total).bool().tril(total - count)
        mask = causal & self.real[:, None, None, :]
        return read_mask(mask, before=self.cache.slots_before(count), new=count, batch=batch)

    def rounded(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after their rounding in cache space, float64 in model space."""
        return self.space.to_model(*(x.to(self.dtype) for x in self.space.to_cache(k, v)))

    def step(self, count: int, *, kept: Tensor | None = None, gqa: int = 2, **options: Any) -> None:
        """Append `count` slots, attend from them, and compare."""
        seen = self.put(*self.fresh(count), kept)
        self.check(count, seen=seen, gqa=gqa, **options)

    def check(self, count: int, *, seen: Seen | None = None, gqa: int = 2, **options: Any) -> None:
        """Attend from the newest `count` slots and compare with float64."""
        shape = (len(self.k), self.shape[0] * gqa, count, self.shape[1])
        q = torch.randn(*shape, generator=self.generator).to(self.dtype)
        k, v, positions = self.expected()
        at = (self.real.cumsum(1) - 1).masked_fill(~self.real, -1)[:, -count:]
        where = {"q_positions": at, "positions": positions, **options}
        truth = attention(q.double(), k, v, **where)
        short = torch_attention(q, k.to(q.dtype), v.to(q.dtype), **where)
        out = self.cache.attend(q, seen=seen, **options)
        assert out.dtype == q.dtype
        allowed = allowed_error(
            self.cache.store.backend_name,
            out,
            truth,
            bfloat16=lambda: torch_attention(*(x.bfloat16() for x in (q, k, v)), **where),
        )
        assert_close(out, truth, torch_error=relative_error(short, truth), allowed=allowed)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the cache holds: K and V float64 `[B, H, N, D]` in model space, packed ones decoded; positions."""
        longest = max(x.shape[1] for x in self.k)
        k = torch.zeros(len(self.k), self.shape[0], longest, self.shape[1], dtype=torch.float64)
        v, positions = k.clone(), torch.full((len(self.k), longest), -1)
        for row in range(len(self.k)):
            count = self.k[row].shape[1]
            k[row, :, :count], v[row, :, :count] = self.k[row], self.v[row]
            positions[row, :count] = torch.arange(count)
            if self.cache.store is not None and (counts := self.cache.store.rows[row]).packed:
                packed = [at for at in range(count) if at not in counts.pins][: counts.packed]
                k[row, :, packed], v[row, :, packed] = self.decoded(row)
        return k, v, positions

    def decoded(self, row: int) -> tuple[Tensor, Tensor]:
        """The packed tokens of one sequence as the slow reader reads them, float64 `[H, n, D]` in model space."""
        data, *rest = records_of(self.cache, row)
        form = self.cache.store.format
        norms = rest.pop(0) if form.token_scale else None
        records = Records(data, norms, rest.pop(0) if rest else None)
        read = slow_decoder.decode(records, form, self.shape[1])
        return self.space.to_model(*(torch.from_numpy(x).transpose(0, 1).flatten(1, 2) for x in read))

    def remove(self, count: int) -> None:
        """Crop; tokens of a cut group are from now on what they had been decoded to."""
        k, v, _ = self.expected()
        self.cache.remove(count)
        kept = self.real.shape[1] - count
        for row in range(len(self.k)):
            tokens = int(self.real[row, :kept].sum())
            self.k[row], self.v[row] = k[row, :, :tokens], v[row, :, :tokens]
        self.real = self.real[:, :kept]

    def select(self, rows: Sequence[int]) -> None:
        """Choose sequences."""
        self.cache.select(rows)
        self.k, self.v, self.real = [self.k[r] for r in rows], [self.v[r] for r in rows], self.real[list(rows)]
