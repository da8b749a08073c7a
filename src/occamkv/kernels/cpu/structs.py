"""Formats and tensors as the structs of the native library. Whoever makes a struct keeps the tensors alive."""

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats import Format, padded
from occamkv.kernels.cpu import library

DTYPES = {torch.float32: library.F32, torch.bfloat16: library.BF16, torch.float16: library.F16}
"""Dtypes of K, V and queries that the library reads."""


def layout_of(format: Format, *, kv_heads: int, head_dim: int) -> library.Layout:
    """Return `okv_layout` of a format.

    Raises:
        UnsupportedInput: The native code does not read its levels.
    """
    if format.levels != "uniform":
        raise UnsupportedInput(f"the tokens are packed with {format.levels} levels; the C++ kernels read uniform ones.")
    sections = format.sections(head_dim)
    offsets = [sum(sections.sizes[:i]) for i in range(1, 7)]
    per_token = format.k_axis == "token"
    return library.Layout(
        kv_heads,
        head_dim,
        padded(head_dim),
        int(format.k_bits),
        int(format.v_bits),
        per_token,
        min(format.k_group, head_dim) if per_token else 0,
        min(format.v_group, head_dim),
        format.record_tokens,
        format.metadata_bits,
        8 * format.norm_bytes,
        *offsets,
    )


def readable(x: Tensor) -> Tensor:
    """Return x itself if the library can read it, else a copy: a known dtype, channels side by side."""
    x = x if x.dtype in DTYPES else x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def view_of(x: Tensor) -> library.View:
    """Return `okv_tensor` of a readable tensor `[B, H, T, D]`."""
    return library.View(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), DTYPES[x.dtype], 0)
