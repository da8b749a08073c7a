"""Attention on packed pages in native order: few queries in one launch, all else through torch, block by block."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from occamkv.formats.pages import CANONICAL, Pages
from occamkv.formats.records import decode_pages
from occamkv.kernels import blockwise
from occamkv.kernels.contract import FullTokens, PackedTokens
from occamkv.kernels.cuda import launching, layout
from occamkv.kernels.cuda.call import COLUMNS, MAX_PARTS, MAX_QUERIES, Options, check_places, prepare
from occamkv.ops.rope import KeyBias

CHECK_VARIABLE = "OCCAMKV_CHECK"
"""Environment variable: block tables and lengths are read back and checked before every launch."""

_BLOCKS_PER_PROCESSOR, _NARROW = 4, 128  # half as many where head_dim is wider than this: registers
_PAGES_PER_BLOCK = 2  # at least, so that one is copied while another is read
_BLOCK_COST = 2  # what a block does besides, in pages; a guess until it is measured


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
    packed_splits: int | None = None,
) -> Tensor:
    """Attend from q to packed and full-precision tokens at once; see `occamkv.kernels.blockwise.attend`.

    Shapes, dtypes and devices are checked before every launch. Page numbers and lengths lie on the GPU, and reading
    them back would make every step wait: the layer cache makes them from its own lists, and torch's route reads them
    anyway. For tables of another origin set the environment variable `OCCAMKV_CHECK=1`: then they are read back and
    checked before every launch that no graph captures. `layout.check_range` refuses records when they are made.

    Args beyond the contract:
        packed_splits: Blocks that share the pages of a sequence and KV head; default `splits_for` the GPU.

    Raises:
        UnsupportedInput: Shapes, dtypes or devices do not fit together, the table names pages that are not there, or
            pages lie in another order.
    """
    for slab in () if packed is None else packed.slabs:
        slab.check_order(layout.ORDER)
    if key_bias is not None and not len(key_bias.rotary.frequencies):
        key_bias = None
    parts = sum(part.k.shape[2] > 0 for part in full)
    if mask is not None or key_bias is not None or q.shape[2] > MAX_QUERIES or parts > MAX_PARTS:
        return blockwise.attend(
            q,
            q_positions=q_positions,
            packed=packed,
            full=full,
            scale=scale,
            mask=mask,
            window=window,
            softcap=softcap,
            sinks=sinks,
            hadamard_block=hadamard_block,
            balance=balance,
            rotate_output=rotate_output,
            key_bias=key_bias,
            read=decode_native,
        )
    if packed_splits is None:
        packed_splits = splits_for(q, packed, launching.processors(q.device))
    call, out = prepare(
        q,
        q_positions=q_positions,
        packed=packed,
        full=full,
        options=Options(scale, window, softcap, sinks, hadamard_block, balance, rotate_output),
        packed_splits=packed_splits,
    )
    if packed is not None and _reads_back(q.device):
        check_places(packed)
    if out.numel():
        launching.launch(call)
    return out.to(q.dtype)


def _reads_back(device: torch.device) -> bool:
    """Return whether what lies on the device is checked, too."""
    return device.type == "cpu" or (bool(os.environ.get(CHECK_VARIABLE)) and not launching.stream_of(device)[1])


def splits_for(q: Tensor, packed: PackedTokens | None, processors: int) -> int:
    """Return how many blocks share the pages of a sequence and KV head, from shapes alone."""
    if packed is None:
        return 0
    kv_heads = packed.slabs[0].kv_heads
    rows = kv_heads * q.shape[0] * -(-q.shape[1] * q.shape[2] // kv_heads // COLUMNS)
    slots = processors * (_BLOCKS_PER_PROCESSOR if q.shape[3] <= _NARROW else _BLOCKS_PER_PROCESSOR // 2)
    return _shortest(rows, packed.table.shape[1], slots)


@lru_cache(maxsize=4096)
def _shortest(rows: int, pages: int, slots: int) -> int:
    """Return the number of splits with which the last of `rows` x splits blocks ends first; `slots` run at a time."""

    def time(splits: int) -> int:
        return -(-rows * splits // slots) * (-(-pages // splits) + _BLOCK_COST)

    most = max(1, min(pages // _PAGES_PER_BLOCK, 8 * slots // max(1, rows)))
    return min(range(1, most + 1), key=time)


def decode_native(pages: Pages) -> tuple[Tensor, Tensor]:
    """Read whole pages in native order back: K and V, float32 `[P, H, 128, D]` in cache space.

    Raises:
        UnsupportedInput: Their bytes lie in another order.
    """
    pages.check_order(layout.ORDER)
    records = layout.to_canonical(pages.records, format=pages.format, head_dim=pages.head_dim)
    return decode_pages(replace(pages, records=records, order=CANONICAL))
