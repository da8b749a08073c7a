"""The CPU backend: C++ kernels that read packed bytes, one build per instruction set, chosen when they are loaded.

Short steps (up to 8 queries) run on the packed bytes; long prompts run through torch on blocks that the backend
dequantizes, never on the whole cache at once.
"""

import torch

from occamkv.formats import Format
from occamkv.formats.pages import CANONICAL
from occamkv.kernels.cpu.attention import HEAD_DIM_STEP, attend
from occamkv.kernels.cpu.encoding import decode_pages as decode
from occamkv.kernels.cpu.encoding import encode
from occamkv.kernels.cpu.library import unavailable
from occamkv.kernels.cpu.step import stepper

__all__ = ["attend", "decode", "encode", "name", "order", "refuses", "stepper"]

name, order = "cpu", CANONICAL


def refuses(format: Format, device: torch.device, head_dim: int | None = None) -> str | None:
    """Return why this backend cannot take `format` on `device`, one sentence, or None."""
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    if format.levels != "uniform":
        return f"it reads codes that mean code * scale + minimum, not {format.levels} levels"
    if head_dim is not None and head_dim % HEAD_DIM_STEP:
        return f"it takes head_dims that are multiples of {HEAD_DIM_STEP}, not {head_dim}"
    return unavailable()
