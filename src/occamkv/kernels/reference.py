"""The reference backend: decode, then attend, in plain torch. Any device, any format, slow and small."""

import torch
from torch import Tensor

from occamkv import ops
from occamkv.formats import Format, records
from occamkv.formats.pages import CANONICAL
from occamkv.formats.records import Records
from occamkv.formats.records import decode_pages as decode
from occamkv.kernels.blockwise import attend
from occamkv.kernels.contract import StepLayer
from occamkv.ops.norms import Norm

__all__ = ["attend", "decode", "encode", "name", "order", "refuses", "stepper"]

name, order = "reference", CANONICAL


def refuses(format: Format, device: torch.device, head_dim: int | None = None) -> str | None:
    """Return None: the reference takes every format and every head_dim on every device."""
    return None


def stepper(layer: StepLayer) -> None:
    """Return None: the reference has no call for a whole step."""


def encode(
    k: Tensor,
    v: Tensor,
    *,
    format: Format,
    grid: ops.affine.Grid = "minmax",
    clip: float | None = 1.0,
    norm: Norm = "l2",
    feedback: Tensor | None = None,
    hadamard_block: int | None = None,
    balance: Tensor | None = None,
    rotate_v: bool = False,
) -> Records:
    """Quantize and pack N groups of tokens.

    Args:
        k: `[N, H, G, D]`, G = `format.record_tokens`; cache space, or model space if the crossing is asked for.
        v: The same shape.
        format: What to write.
        grid: How the range of a group is chosen.
        clip: As in `formats.records.encode`.
        norm: As above.
        feedback: As above.
        hadamard_block: Rotate K first, in blocks of this size.
        balance: d, `[H, D]`: multiply K by it before the rotation.
        rotate_v: Rotate V first.

    Raises:
        UnsupportedInput: A value does not fit its stored dtype.
    """
    if hadamard_block is not None or balance is not None:
        k = ops.rotate(k, hadamard_block=hadamard_block, balance=balance)
    return records.encode(
        k, ops.hadamard(v) if rotate_v else v, format=format, grid=grid, clip=clip, norm=norm, feedback=feedback
    )
