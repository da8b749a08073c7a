"""Attention on packed bytes: arguments are checked and described here, the rest is C++ (`native/attend.inc`)."""

from collections.abc import Sequence
from ctypes import pointer

import torch
from torch import Tensor

from occamkv import ops
from occamkv.errors import UnsupportedInput
from occamkv.formats.format import MAX_HEAD_DIM
from occamkv.kernels import blockwise
from occamkv.kernels.checks import check_attend
from occamkv.kernels.contract import FullTokens, PackedTokens
from occamkv.kernels.cpu import library
from occamkv.kernels.cpu.encoding import decode_pages
from occamkv.kernels.cpu.key_bias import turns_of
from occamkv.kernels.cpu.layouts import EVERYTHING, full_struct, mask_struct, packed_struct
from occamkv.kernels.cpu.structs import readable, view_of
from occamkv.ops.rope import KeyBias

MAX_QUERIES = 8
"""Steps with more queries go through torch on dequantized blocks."""


HEAD_DIM_STEP = 16
"""Lanes of a vector, which are read together."""


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
) -> Tensor:
    """Attend from q to packed and full-precision tokens at once; see `occamkv.kernels.blockwise.attend`.

    Raises:
        UnsupportedInput: Shapes, dtypes or devices do not fit together, or pages lie outside the pool.
    """
    keep: list[object] = []
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
    batch, query_heads, queries, head_dim = q.shape
    _check_place(q)
    packed_tokens = None if packed is None else packed_struct(packed, batch, keep)
    if q.shape[2] > MAX_QUERIES:
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
            read=decode_pages,
        )
    given = readable(q)
    out = torch.empty((batch, queries, query_heads, head_dim), dtype=given.dtype).transpose(1, 2)
    parts = [full_struct(part, batch, keep) for part in full]
    places = q_positions.to(torch.int64).contiguous()
    turns = turns_of(key_bias)
    vectors = [None if x is None else x.to(torch.float32).contiguous() for x in (sinks, balance)]
    call = library.Attend(
        q=view_of(given),
        out=view_of(out),
        batch=batch,
        query_heads=query_heads,
        kv_heads=kv_heads,
        queries=queries,
        head_dim=head_dim,
        q_positions=places.data_ptr(),
        packed=None if packed_tokens is None else pointer(packed_tokens),
        full=(library.Full * len(parts))(*parts),
        full_count=len(parts),
        mask=None if mask is None else pointer(mask_struct(mask, keep)),
        sinks=None if vectors[0] is None else vectors[0].data_ptr(),
        balance=None if vectors[1] is None else vectors[1].data_ptr(),
        key_bias=None if turns is None else pointer(turns.up_to(_positions(packed, full))),
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap or 0.0,
        window=EVERYTHING if window is None else min(window, EVERYTHING),
        hadamard_block=hadamard_block or 0,
        output_hadamard_block=ops.hadamard_block(head_dim) if rotate_output else 0,
        threads=torch.get_num_threads(),
    )
    library.run(call)
    return out.to(q.dtype)


def _positions(packed: PackedTokens | None, full: Sequence[FullTokens]) -> int:
    """Return a number above the positions of all tokens."""
    furthest = [int(part.positions.max()) for part in full if part.positions.numel()]
    if packed is not None and packed.lengths.numel():
        pinned = 0 if packed.skips is None else packed.skips.shape[1]
        furthest.append(int((packed.first_position + packed.lengths).max()) + pinned - 1)
    return max(furthest, default=-1) + 1


def _check_place(q: Tensor) -> None:
    """Raise unless the native code can read q: on the CPU, in whole vectors, within its buffers."""
    head_dim = q.shape[3]
    if q.device.type != "cpu" or head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise UnsupportedInput(
            f"q lies on {q.device} with head_dim {head_dim}; allowed: the CPU, multiples of {HEAD_DIM_STEP} up to "
            f"{MAX_HEAD_DIM}. Ask `kernels.backend_for` which backend takes it."
        )
