"""What `attend` is given, as the structs of the native library."""

from collections.abc import Sequence
from ctypes import Array

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.pages import CANONICAL, Pages
from occamkv.kernels.contract import FullTokens, PackedTokens
from occamkv.kernels.cpu import library
from occamkv.kernels.cpu.structs import DTYPES, layout_of, readable, view_of

EVERYTHING = 2**62
"""A window wider than any context."""

_MASK_DTYPES = DTYPES | {torch.bool: library.BOOL}


def _numbers(x: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    if x.dtype != torch.int64 or tuple(x.shape) != shape or x.device.type != "cpu":
        raise UnsupportedInput(
            f"{what} is {x.dtype} {tuple(x.shape)} on {x.device}; allowed: torch.int64 {shape} on the CPU."
        )
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _slab(pages: Pages, start: int, first: Pages, record_bytes: int) -> library.Slab:
    pages.check_order(CANONICAL)
    if (pages.format, pages.head_dim, pages.kv_heads) != (first.format, first.head_dim, first.kv_heads):
        raise UnsupportedInput(
            f"pages of one layer hold {first.format} and {pages.format}, or heads of different shapes."
        )
    form, heads = pages.format, (pages.count, pages.kv_heads, pages.format.page_records)
    norm_dtype = torch.float32 if form.norm_dtype == "float32" else torch.float16
    places = [
        _place("records", pages.records, torch.uint8, (*heads, record_bytes)),
        _place("norms", pages.norms, norm_dtype, (pages.count, PAGE_TOKENS) if form.token_scale else None),
        _place("super_scales", pages.super_scales, torch.float16, (*heads, 2) if form.metadata_bits == 8 else None),
    ]
    return library.Slab(*places, start, pages.count)


def _place(what: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...] | None) -> int:
    """Return where a tensor of pages lies, 0 for one that its format does not have."""
    if x is None and shape is None:
        return 0
    if x is None or x.dtype != dtype or x.shape != shape or not x.is_contiguous() or x.device.type != "cpu":
        given = "missing" if x is None else f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        allowed = "none" if shape is None else f"{dtype} {shape}, dense, on the CPU"
        raise UnsupportedInput(
            f"{what} of pages are {given}; allowed: {allowed}. They were written by another version "
            "or for another format."
        )
    return x.data_ptr()


def slab_structs(slabs: Sequence[Pages], starts: Sequence[int], record_bytes: int) -> Array[library.Slab]:
    """Describe slabs."""
    made = [_slab(pages, start, slabs[0], record_bytes) for pages, start in zip(slabs, starts, strict=True)]
    return (library.Slab * len(made))(*made)


def packed_struct(packed: PackedTokens, batch: int, keep: list[object]) -> library.Packed:
    """Describe packed tokens; what the description points at goes to `keep`."""
    first = packed.slabs[0]
    form = layout_of(packed.format, kv_heads=first.kv_heads, head_dim=first.head_dim)
    table = _numbers(packed.table, (batch, packed.table.shape[-1]), "the block table")
    lengths, places = (
        _numbers(x, (batch,), what).contiguous()
        for x, what in ((packed.lengths, "lengths"), (packed.first_position, "first_position"))
    )
    skips = (
        None if packed.skips is None else _numbers(packed.skips, (batch, packed.skips.shape[-1]), "skips").contiguous()
    )
    array = slab_structs(packed.slabs, packed.starts, form.record_bytes)
    keep += [table, lengths, places, skips, array]
    return library.Packed(
        layout=form,
        slab_count=len(array),
        slabs=array,
        table=table.data_ptr(),
        table_width=table.shape[1],
        table_stride=table.stride(0),
        lengths=lengths.data_ptr(),
        first_position=places.data_ptr(),
        skips=None if skips is None else skips.data_ptr(),
        skip_count=0 if skips is None else skips.shape[1],
    )


def full_struct(part: FullTokens, batch: int, keep: list[object]) -> library.Full:
    """Describe tokens in full precision; what the description points at goes to `keep`."""
    k, v = readable(part.k), readable(part.v)
    positions = _numbers(part.positions, (batch, k.shape[2]), "positions").contiguous()
    added = None if part.logit_bias is None else part.logit_bias.to(torch.float32).contiguous()
    keep += [k, v, positions, added]
    return library.Full(
        view_of(k), view_of(v), k.shape[2], positions.data_ptr(), None if added is None else added.data_ptr()
    )


def mask_struct(mask: Tensor, keep: list[object]) -> library.Mask:
    """Describe a mask; a dimension of size 1 is repeated."""
    mask = mask if mask.dtype in _MASK_DTYPES else mask.to(torch.float32)
    keep.append(mask)
    batch, head, query, position = (
        0 if size == 1 and i < 2 else step for i, (size, step) in enumerate(zip(mask.shape, mask.stride(), strict=True))
    )
    return library.Mask(mask.data_ptr(), batch, head, query, position, mask.shape[3], _MASK_DTYPES[mask.dtype], 0)
