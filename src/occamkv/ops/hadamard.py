"""The orthonormal Hadamard rotation (Canalized Rotation, arXiv:2605.19660), for any head_dim.

The butterflies are element-wise sums in a fixed order, never a matrix product: a token is rotated to the same bits
whether it comes alone or in a prompt, so records do not depend on how a text was cut into appends.
"""

import torch
from torch import Tensor


def hadamard_block(head_dim: int) -> int:
    """Return the size of a Hadamard block: the largest power of two that divides `head_dim` (80 -> 16)."""
    return head_dim & -head_dim


def hadamard(x: Tensor, *, block: int | None = None) -> Tensor:
    """Rotate the last dimension by the orthonormal Sylvester-Hadamard matrix, block by block. It is its own inverse.

    Args:
        x: `[..., D]`, any float dtype; the sums run in float32.
        block: Size of one block, a power of two that divides D. Default: the largest.

    Returns:
        float32 `[..., D]`.
    """
    size = hadamard_block(x.shape[-1]) if block is None else block
    y = x.to(torch.float32).reshape(-1, size)
    half = 1
    while half < size:
        pairs = y.reshape(-1, 2, half)
        first, second = pairs[:, 0], pairs[:, 1]
        y = torch.stack((first + second, first - second), dim=1)
        half *= 2
    return (y * size**-0.5).reshape(x.shape)


def rotate(x: Tensor, *, hadamard_block: int | None = None, balance: Tensor | None = None) -> Tensor:
    """Take K from model space to cache space: `H(d * k)`.

    Args:
        x: `[B, H, T, D]` in model space.
        hadamard_block: Block size of the rotation, or None for no rotation.
        balance: d, `[H, D]`, or None for 1. The query side uses 1 / d.

    Returns:
        float32 `[B, H, T, D]` in cache space.
    """
    y = x.to(torch.float32)
    if balance is not None:
        y = y * balance.to(y)[:, None, :]
    return y if hadamard_block is None else hadamard(y, block=hadamard_block)


def rotate_back(x: Tensor, *, hadamard_block: int | None = None, balance: Tensor | None = None) -> Tensor:
    """Take K or V from cache space back to model space: `H(x) / d`, the inverse of `rotate`.

    Args:
        x: `[B, H, T, D]` in cache space.
        hadamard_block: As in `rotate`.
        balance: As in `rotate`.

    Returns:
        float32 `[B, H, T, D]` in model space.
    """
    y = x.to(torch.float32) if hadamard_block is None else hadamard(x, block=hadamard_block)
    return y if balance is None else y / balance.to(y)[:, None, :]
