"""The CUDA backend in the making: attention, encoding, whole steps. It is not yet among the backends."""

import torch

from occamkv.formats import Format
from occamkv.kernels.cuda.attention import attend
from occamkv.kernels.cuda.encoding import encode
from occamkv.kernels.cuda.launching import unavailable
from occamkv.kernels.cuda.stepping import stepper

__all__ = ["attend", "encode", "name", "refuses", "refuses_format", "stepper"]

name = "cuda"


def refuses(format: Format, device: torch.device, head_dim: int | None = None) -> str | None:
    """Return why this backend cannot take `format` on `device`, one sentence, or None."""
    return refuses_format(format) or unavailable(device)


def refuses_format(format: Format) -> str | None:
    """Return why the kernel cannot read `format`, one sentence, or None."""
    if format.levels != "uniform":
        return f"it reads codes that mean code * scale + minimum, not {format.levels} levels"
    if format.k_axis != "channel":
        return "it reads K with one scale for each channel of a group of tokens, not one for each token"
    return None
