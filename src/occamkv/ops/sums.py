"""Sums in one fixed order, built of element-wise additions: every backend and every batch gets the same bits."""

import torch
from torch import Tensor


def folded_sum(x: Tensor, *, dim: int) -> Tensor:
    """Return the sum over `dim`, float32 without that dimension.

    The second half is added to the first, and again, until one value is left; of an odd number the last waits.

    Args:
        x: float32, any shape.
        dim: The dimension that disappears.
    """
    while x.shape[dim] > 1:
        width = x.shape[dim]
        half = width // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat((folded, x.narrow(dim, width - 1, 1)), dim=dim) if width % 2 else folded
    return x.squeeze(dim)
