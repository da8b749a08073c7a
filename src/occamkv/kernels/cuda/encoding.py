"""Encoding of records in native order: the canonical bytes by torch, then moved to where the kernel reads them."""

from torch import Tensor

from occamkv import ops
from occamkv.formats import Format, records
from occamkv.formats.records import Records
from occamkv.kernels.contract import StepLayer
from occamkv.kernels.cuda import layout
from occamkv.ops.affine import Grid
from occamkv.ops.norms import Norm


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
    """Quantize and pack N groups of tokens; arguments as in `kernels.reference.encode`, its bytes in native order.

    Raises:
        UnsupportedInput: A value does not fit its stored dtype, or a scale is too large for the kernel.
    """
    k = ops.rotate(k, hadamard_block=hadamard_block, balance=balance)
    v = ops.hadamard(v) if rotate_v else v
    made = records.encode(k, v, format=format, grid=grid, clip=clip, norm=norm, feedback=feedback)
    layout.check_range(made.data, made.super_scales, format=format, head_dim=k.shape[-1])
    return made._replace(data=layout.to_native(made.data, format=format, head_dim=k.shape[-1]))


def stepper(layer: StepLayer) -> None:
    """Return None: there is no call for a whole step yet."""
