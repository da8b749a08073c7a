"""The CUDA backend: kernels in CUDA C++ that read packed bytes in an order of their own, compiled when first needed."""

import torch

from occamkv.formats import Format
from occamkv.kernels.cuda import launching
from occamkv.kernels.cuda.attention import attend
from occamkv.kernels.cuda.attention import decode_native as decode
from occamkv.kernels.cuda.encoding import encode
from occamkv.kernels.cuda.layout import ORDER
from occamkv.kernels.cuda.stepping import stepper

__all__ = ["attend", "decode", "encode", "name", "order", "refuses", "refuses_format", "stepper"]

name, order = "cuda", ORDER

HEAD_DIM_STEP = 8
"""Channels that are loaded together."""


def refuses(format: Format, device: torch.device, head_dim: int | None = None) -> str | None:
    """Return why this backend cannot take `format` on `device`, one sentence, or None."""
    missing = launching.unavailable(device)
    return missing if device.type != "cuda" and missing else refuses_format(format, head_dim) or missing


def refuses_format(format: Format, head_dim: int | None = None) -> str | None:
    """Return why the kernels cannot read `format`, one sentence, or None."""
    if format.levels != "uniform":
        return f"it reads codes that mean code * scale + minimum, not {format.levels} levels"
    if format.k_axis != "channel":
        return "it reads K with one scale for each channel of a group of tokens, not one for each token"
    if head_dim is not None and head_dim % HEAD_DIM_STEP:
        return f"it takes head_dims that are multiples of {HEAD_DIM_STEP}, not {head_dim}"
    return None
