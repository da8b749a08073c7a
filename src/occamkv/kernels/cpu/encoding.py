"""Encoding and decoding of records in C++, to the same bytes and numbers as `formats.records`."""

import torch
from torch import Tensor

from occamkv import ops
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS, Format, records
from occamkv.formats.pages import CANONICAL, Pages
from occamkv.formats.records import Records
from occamkv.kernels.cpu import library
from occamkv.kernels.cpu.structs import layout_of, readable, view_of
from occamkv.ops.affine import Grid, clip_share
from occamkv.ops.norms import NORMS, Norm

_GRIDS = {"minmax": library.MINMAX, "paper": library.PAPER, "unbiased": library.UNBIASED}
_NO_MEMORY = 2


def encode(
    k: Tensor,
    v: Tensor,
    *,
    format: Format,
    grid: Grid = "minmax",
    clip: float | None = 1.0,
    norm: Norm = "l2",
    feedback: Tensor | None = None,
    hadamard_block: int | None = None,
    balance: Tensor | None = None,
    rotate_v: bool = False,
) -> Records:
    """Quantize and pack N groups of tokens; arguments as in `kernels.reference.encode`, the same bytes.

    Raises:
        UnsupportedInput: A value does not fit its stored dtype, or shapes do not fit together.
    """
    _check(k, v, format, hadamard_block=hadamard_block, balance=balance, feedback=feedback)
    groups, heads, tokens, head_dim = k.shape
    given = None
    if format.token_scale and norm != "l2":
        k, hadamard_block, balance = ops.rotate(k, hadamard_block=hadamard_block, balance=balance), None, None
        given = _norms(k, norm, format).to(torch.float32).contiguous()
    k, v = readable(k), readable(v)
    balance, feedback = (None if t is None else t.to(torch.float32).contiguous() for t in (balance, feedback))
    call = encode_struct(format, kv_heads=heads, head_dim=head_dim, grid=grid, clip=clip)
    layout = call.layout
    packed = Records(
        torch.empty(groups, heads, layout.record_bytes, dtype=torch.uint8),
        torch.empty(groups, tokens, dtype=getattr(torch, format.norm_dtype)) if format.token_scale else None,
        torch.empty(groups, heads, 2, dtype=torch.float16) if format.metadata_bits == 8 else None,
    )
    call.k, call.v, call.groups = view_of(k), view_of(v), groups
    call.k_hadamard_block = hadamard_block or 0
    call.v_hadamard_block = ops.hadamard_block(head_dim) if rotate_v else 0
    call.balance, call.feedback, call.given_norms, call.records, call.norms, call.super_scales = (
        None if t is None else t.data_ptr() for t in (balance, feedback, given, *packed)
    )
    call.threads = torch.get_num_threads()
    outcome = library.library().okv_encode_run(call)
    if outcome == _NO_MEMORY:
        raise MemoryError("no memory to encode a group of tokens.")
    if outcome:
        k = ops.rotate(k, hadamard_block=hadamard_block, balance=balance)
        norms = _norms(k, norm, format) if format.token_scale else None
        raise records.does_not_fit(k, ops.hadamard(v) if rotate_v else v, norms, format=format)
    return packed


def encode_struct(format: Format, *, kv_heads: int, head_dim: int, grid: Grid, clip: float | None) -> library.Encode:
    """Describe how records are made; what they are made of is left out."""
    layout = layout_of(format, kv_heads=kv_heads, head_dim=head_dim)
    k_values = format.record_tokens if format.k_axis == "channel" else layout.k_group
    return library.Encode(
        layout=layout,
        grid=_GRIDS[grid],
        k_clip=clip_share(layout.k_bits, k_values) if clip is None else clip,
        v_clip=clip_share(layout.v_bits, layout.v_group) if clip is None else clip,
    )


def decode_pages(pages: Pages, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Read whole pages back, every record of them.

    Args:
        pages: P pages of a format with uniform levels.
        dtype: float32 or bfloat16.

    Returns:
        K and V `[P, H, 128, D]` in cache space, as `formats.records.decode_pages` gives them.

    Raises:
        UnsupportedInput: Their bytes lie in another backend's order.
    """
    pages.check_order(CANONICAL)
    count, heads, per_page, _ = pages.records.shape
    tokens = pages.format.record_tokens
    k, v = (torch.empty(count, heads, PAGE_TOKENS, pages.head_dim, dtype=dtype) for _ in range(2))
    layout = layout_of(pages.format, kv_heads=heads, head_dim=pages.head_dim)
    norms = None if pages.norms is None else pages.norms.unflatten(1, (per_page, tokens)).transpose(0, 1).contiguous()
    supers = None if pages.super_scales is None else pages.super_scales.contiguous()
    data = pages.records.contiguous()
    for place in range(per_page):
        own = slice(place * tokens, (place + 1) * tokens)
        call = library.Decode(
            layout,
            data[:, :, place].data_ptr(),
            data.stride(0),
            data.stride(1),
            None if norms is None else norms[place].data_ptr(),
            None if supers is None else supers[:, :, place].data_ptr(),
            0 if supers is None else supers.stride(0),
            0 if supers is None else supers.stride(1),
            count,
            view_of(k[:, :, own]),
            view_of(v[:, :, own]),
            torch.get_num_threads(),
        )
        library.run(call)
    return k, v


def _norms(k: Tensor, norm: Norm, format: Format) -> Tensor:
    return NORMS[norm](k).to(getattr(torch, format.norm_dtype))


def _check(
    k: Tensor,
    v: Tensor,
    format: Format,
    *,
    hadamard_block: int | None,
    balance: Tensor | None,
    feedback: Tensor | None,
) -> None:
    heads, head_dim = k.shape[1], k.shape[3]
    if k.shape != v.shape or k.shape[2] != format.record_tokens:
        raise UnsupportedInput(
            f"K has shape {tuple(k.shape)} and V {tuple(v.shape)}; allowed: both [N, H, {format.record_tokens}, D]."
        )
    if balance is not None and balance.shape != (heads, head_dim):
        raise UnsupportedInput(f"balance has shape {tuple(balance.shape)}; allowed: {(heads, head_dim)}.")
    if feedback is not None and feedback.shape != (heads, head_dim, head_dim):
        raise UnsupportedInput(f"feedback has shape {tuple(feedback.shape)}; allowed: {(heads, head_dim, head_dim)}.")
    if hadamard_block is not None and (hadamard_block & (hadamard_block - 1) or head_dim % hadamard_block):
        raise UnsupportedInput(
            f"hadamard_block is {hadamard_block}; allowed: a power of two that divides {head_dim}, or None."
        )
