"""Attention over packed and full-precision tokens in plain torch, block by block, with any reader of pages.

K and V are dequantized a few pages at a time, so the workspace does not grow with the context, and the parts are
joined by an online softmax (Milakov and Gimelshein, arXiv:1805.02867). The reference reads all its tokens so; a faster
backend, whose own kernels are made for few queries, reads them so for long prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from occamkv import ops
from occamkv.formats import PAGE_TOKENS, records
from occamkv.formats.pages import Pages
from occamkv.kernels.checks import check_attend, check_lengths
from occamkv.kernels.contract import FullTokens, PackedTokens, positions_of
from occamkv.ops.rope import KeyBias

Reader = Callable[[Pages], tuple[Tensor, Tensor]]
"""Reads whole pages back: K and V, float32 `[P, H, 128, D]` in cache space."""

_KV_WORKSPACE_BYTES = 4 * 2**20  # K and V of one block as float32; temporaries of decoding take about as much again
_LOGITS = 2**19  # logits of one block of queries
_ON_DEVICES = 32  # times as much of both on GPUs, where small blocks are mostly launches


def attend(
    q: Tensor,
    *,
    q_positions: Tensor,
    packed: PackedTokens | None,
    full: Sequence[FullTokens],
    scale: float | None = None,
    mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    hadamard_block: int | None = None,
    balance: Tensor | None = None,
    rotate_output: bool = False,
    key_bias: KeyBias | None = None,
    read: Reader = records.decode_pages,
) -> Tensor:
    """Attend from q to packed and full-precision tokens at once.

    Args:
        q: `[B, Hq, Tq, D]` in model space, any float dtype; Hq a multiple of the KV heads.
        q_positions: int64 `[B, Tq]`: position of each query in its sequence; -1 for a pad.
        packed: Packed tokens, or None.
        full: Tokens in full precision.
        scale: Softmax scale; default `D ** -0.5`.
        mask: None for causal (a query sees positions up to its own). Else `[B or 1, Hq or 1, Tq, N]`, N above every
            position: boolean (True is seen) or additive; it then decides alone what is seen.
        window: A query sees only positions above its own minus `window`.
        softcap: Logits become `softcap * tanh(logit / softcap)` before the mask.
        sinks: Learned sink logits `[Hq]`: one more column of the softmax that carries no value.
        hadamard_block: Rotate q first, in blocks of this size.
        balance: d, `[H, D]`: divide q by it before the rotation.
        rotate_output: Rotate the result back, because V is stored rotated.
        key_bias: What was taken out of every K, packed or not: its product with q in model space comes back into the
            logit, before soft cap and mask.
        read: How pages are read back.

    Returns:
        `[B, Hq, Tq, D]` in model space and in the dtype of q; a query that sees nothing gives zeros.

    Raises:
        UnsupportedInput: Shapes, dtypes or devices do not fit together, or pages lie outside the pool.
    """
    kv_heads = check_attend(
        q,
        q_positions,
        packed,
        full,
        mask=mask,
        sinks=sinks,
        balance=balance,
        hadamard_block=hadamard_block,
        key_bias=key_bias,
    )
    batch, q_heads, length, head_dim = q.shape
    inverse = None if balance is None else 1 / balance.repeat_interleave(q_heads // kv_heads, dim=0)
    rotated = ops.rotate(q, hadamard_block=hadamard_block, balance=inverse)
    scale = head_dim**-0.5 if scale is None else scale
    queries = (rotated * scale).unflatten(1, (kv_heads, -1))
    running = _Running.start(queries, sinks)
    if key_bias is not None and not len(key_bias.rotary.frequencies):
        key_bias = None
    if key_bias is not None:
        in_model_space = (q.float() * scale).unflatten(1, (kv_heads, -1))
        queries = torch.cat((queries, *_biased_queries(in_model_space, key_bias)), dim=-1)
    view = _View(q_positions, mask, window, softcap)
    for block in _blocks(packed, full, read):
        if key_bias is not None:
            block = block._replace(k=_biased_keys(block, key_bias))
        rows = block.k.shape[0] * block.k.shape[1] * block.k.shape[2] * block.k.shape[3]
        step = max(1, _LOGITS * _share(q) // max(1, rows * queries.shape[2]))
        for first in range(0, length, step):
            _add_block(running, queries, block, view, slice(first, min(first + step, length)))
    out = running.total / torch.where(running.weight > 0, running.weight, 1.0)[..., None]
    out = out.reshape(batch, q_heads, length, head_dim)
    return (ops.hadamard(out) if rotate_output else out).to(q.dtype)


class _Running(NamedTuple):
    """The online softmax so far: largest logit, sum of weights, weighted sum of V. `[B, H, g, Tq]`, the last with D."""

    largest: Tensor
    weight: Tensor
    total: Tensor

    @staticmethod
    def start(queries: Tensor, sinks: Tensor | None) -> "_Running":
        shape = queries.shape[:-1]
        if sinks is None:
            largest = queries.new_full(shape, float("-inf"))
        else:
            largest = sinks.to(queries).reshape(1, shape[1], shape[2], 1).expand(shape).clone()
        return _Running(largest, largest.isfinite().to(queries.dtype), torch.zeros_like(queries))


def _biased_queries(q: Tensor, key_bias: KeyBias) -> tuple[Tensor, Tensor]:
    """Return 2 P more channels of queries `[B, H, g, Tq, D]`, which meet the cosines and sines of `_biased_keys`.

    In the plane of a pair, `q . turn(b, t) = (q1 b1 + q2 b2) cos(t f) + (q2 b1 - q1 b2) sin(t f)`.
    """
    channels = (key_bias.rotary.first, key_bias.rotary.second)
    (q1, q2), (b1, b2) = ([x[..., own] for own in channels] for x in (q, key_bias.vector.to(q)[:, None, None]))
    return q1 * b1 + q2 * b2, q2 * b1 - q1 * b2


def _biased_keys(block: "_Block", key_bias: KeyBias) -> Tensor:
    """Return K of a block with 2 P more channels: cosines and sines of what the bias is turned by at each position."""
    angles = block.positions[..., None].double() * key_bias.rotary.frequencies.to(block.k.device)
    waves = torch.cat((angles.cos(), angles.sin()), dim=-1).float()  # [rows, n * L, 2 P]
    waves = waves.unflatten(1, (block.k.shape[1], -1))[:, :, None].expand(-1, -1, block.k.shape[2], -1, -1)
    return torch.cat((block.k, waves), dim=-1)


class _View(NamedTuple):
    """What a query may see, and how logits are bent."""

    q_positions: Tensor
    mask: Tensor | None
    window: int | None
    softcap: float | None


class _Block(NamedTuple):
    """Some tokens of some sequences: k, v float32 `[rows, n, H, L, D]`, positions `[rows, n * L]`; `first` row."""

    first: int
    k: Tensor
    v: Tensor
    positions: Tensor
    logit_bias: Tensor | None = None


def _add_block(running: _Running, queries: Tensor, block: _Block, view: _View, steps: slice) -> None:
    rows = slice(block.first, block.first + block.k.shape[0])
    q = queries[rows, :, :, steps]
    folded = q.flatten(2, 3)[:, None]  # [rows, 1, H, g * Tq, D]
    logits = folded @ block.k.transpose(-1, -2)  # [rows, n, H, g * Tq, L]
    logits = logits.permute(0, 2, 3, 1, 4).flatten(3).unflatten(2, q.shape[2:4])  # [rows, H, g, Tq, n * L]
    if view.softcap is not None:
        logits = torch.tanh(logits / view.softcap) * view.softcap
    if block.logit_bias is not None:
        logits = logits + block.logit_bias.to(logits).unflatten(0, q.shape[1:3])[:, :, None, None]
    logits = _hide(logits, block, view, rows, steps)
    old = running.largest[rows, :, :, steps]
    largest = torch.maximum(old, logits.amax(-1))
    finite = torch.where(largest.isfinite(), largest, 0.0)
    weights = torch.exp(logits - finite[..., None])
    shrink = torch.exp(old - finite)
    count = block.k.shape[1]
    split = weights.flatten(2, 3).unflatten(-1, (count, -1)).permute(0, 3, 1, 2, 4)  # [rows, n, H, g * Tq, L]
    value = (split @ block.v).sum(1).unflatten(2, q.shape[2:4])
    running.largest[rows, :, :, steps] = largest
    running.weight[rows, :, :, steps] = running.weight[rows, :, :, steps] * shrink + weights.sum(-1)
    running.total[rows, :, :, steps] = running.total[rows, :, :, steps] * shrink[..., None] + value


def _hide(logits: Tensor, block: _Block, view: _View, rows: slice, steps: slice) -> Tensor:
    at = view.q_positions[rows, steps, None]  # [rows, Tq, 1]
    positions = block.positions[:, None, :]  # [rows, 1, n * L]
    seen = (positions >= 0) & (at >= 0)
    if view.window is not None:
        seen = seen & (positions > at - view.window)
    if view.mask is None:
        seen = seen & (positions <= at)
        return logits.masked_fill(~seen[:, None, None], float("-inf"))
    mask = view.mask[rows] if view.mask.shape[0] > 1 else view.mask.expand(block.k.shape[0], -1, -1, -1)
    index = positions.clamp(0, mask.shape[-1] - 1)[:, None].expand(-1, mask.shape[1], at.shape[1], -1)
    picked = mask[:, :, steps].gather(-1, index)
    picked = picked[:, :, None] if mask.shape[1] == 1 else picked.unflatten(1, logits.shape[1:3])
    seen = seen[:, None, None]
    if picked.dtype == torch.bool:
        return logits.masked_fill(~(seen & picked), float("-inf"))
    lowest = torch.finfo(picked.dtype).min / 2  # a hidden token, whatever was added to the lowest number
    return (logits + picked).masked_fill(~seen | (picked <= lowest), float("-inf"))


def _share(x: Tensor) -> int:
    """Return how many times the limits hold where a tensor lies."""
    return 1 if x.device.type == "cpu" else _ON_DEVICES


def _full_blocks(part: FullTokens) -> Iterator[_Block]:
    batch, heads, tokens, head_dim = part.k.shape
    at_once = max(1, _KV_WORKSPACE_BYTES * _share(part.k) // (2 * 4 * heads * head_dim))  # tokens of all rows together
    rows_in_block = max(1, min(batch, at_once // PAGE_TOKENS))
    step = max(1, at_once // rows_in_block)
    for row in range(0, batch, rows_in_block):
        rows = slice(row, row + rows_in_block)
        for first in range(0, tokens, step):
            some = slice(first, first + step)
            k, v = (x[rows, :, some].to(torch.float32)[:, None] for x in (part.k, part.v))
            yield _Block(row, k, v, part.positions[rows, some], part.logit_bias)


def _blocks(packed: PackedTokens | None, full: Sequence[FullTokens], read: Reader) -> Iterator[_Block]:
    for part in full:
        yield from _full_blocks(part)
    if packed is None:
        return
    heads, head_dim = packed.slabs[0].kv_heads, packed.slabs[0].head_dim
    page_bytes = 2 * 4 * heads * PAGE_TOKENS * head_dim
    in_block = max(1, _KV_WORKSPACE_BYTES * _share(packed.table) // page_bytes)
    batch, table, lengths = packed.table.shape[0], packed.table.tolist(), packed.lengths.tolist()
    check_lengths(lengths, record_tokens=packed.format.record_tokens, pages=packed.table.shape[1])
    counts = [records.pages_of(n) for n in lengths]
    longest = max(counts, default=0)
    rows_in_block = max(1, min(batch, in_block // max(1, min(in_block, longest))))
    pages_in_block = max(1, in_block // rows_in_block)
    offsets = torch.arange(PAGE_TOKENS, device=packed.table.device)
    for first in range(0, batch, rows_in_block):
        rows = range(first, min(first + rows_in_block, batch))
        for page in range(0, max(counts[r] for r in rows), pages_in_block):
            last = min(page + pages_in_block, max(counts[r] for r in rows))
            numbers = [table[r][p] for r in rows for p in range(page, last)]
            k, v = read(packed.gather(numbers))
            index = (torch.arange(page, last, device=offsets.device)[:, None] * PAGE_TOKENS + offsets).flatten()
            of_rows = slice(rows.start, rows.stop)
            positions = index + packed.first_position[of_rows, None]
            if packed.skips is not None:
                positions = positions_of(positions, packed.skips[of_rows])
            empty = index >= packed.lengths[of_rows, None]
            shape = (len(rows), last - page)
            k, v = k.unflatten(0, shape), v.unflatten(0, shape)
            if min(lengths[r] for r in rows) < last * PAGE_TOKENS:
                # bytes of records not yet written may read as anything, and 0 * NaN is NaN
                v = v.masked_fill(empty.unflatten(1, (-1, 1, PAGE_TOKENS, 1)), 0.0)
            yield _Block(first, k, v, positions.masked_fill(empty, -1))
