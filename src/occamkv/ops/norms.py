"""Omni-Token Scaling (arXiv:2605.19660): one L2 norm per token over all KV heads."""

import torch
from torch import Tensor


def token_norm(k: Tensor) -> Tensor:
    """Return the L2 norm of each token over all heads and channels.

    The squares are added in one fixed order (channels folded in halves, then head after head), so that every backend
    and every batch gets the same bits. Under tensor parallelism "all heads" means the heads of this rank.

    Args:
        k: `[B, H, T, D]` in cache space.

    Returns:
        float32 `[B, T]`.
    """
    squares = k.to(torch.float32).square()
    while squares.shape[-1] > 1:
        width = squares.shape[-1]
        half = width // 2
        folded = squares[..., :half] + squares[..., half : 2 * half]
        squares = torch.cat((folded, squares[..., 2 * half :]), dim=-1) if width % 2 else folded
    total = squares[:, 0, :, 0]
    for head in range(1, k.shape[1]):
        total = total + squares[:, head, :, 0]
    return total.sqrt()
