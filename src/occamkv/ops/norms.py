"""Token norms: the one number per token, over all KV heads, that is divided out of K before quantizing."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from occamkv.ops.sums import folded_sum

Norm = Literal["l2", "sinkhorn"]
_SINKHORN_ROUNDS = 8


def token_norm(k: Tensor) -> Tensor:
    """Return the L2 norm of each token over all heads and channels (Omni-Token Scaling, arXiv:2605.19660).

    The squares are added in one fixed order (channels folded in halves, then head after head), so that every backend
    and every batch gets the same bits. Under tensor parallelism "all heads" means the heads of this rank.

    Args:
        k: `[B, H, T, D]` in cache space.

    Returns:
        float32 `[B, T]`.
    """
    squares = folded_sum(k.to(torch.float32).square(), dim=-1)
    total = squares[:, 0]
    for head in range(1, k.shape[1]):
        total = total + squares[:, head]
    return total.to(torch.float64).sqrt().to(torch.float32)  # a root in float32 is not always the nearest number


def sinkhorn_norm(k: Tensor) -> Tensor:
    """Return a norm per token from alternating normalisation of tokens and channels (after KVarN, arXiv:2606.03458).

    Channels are divided by their standard deviation over the tokens of the group, tokens by their root mean square over
    all channels, again and again; the product of a token's divisors is its norm. A channel that is large in every
    token then counts no more than the others. Only the token's part is returned: the channels' scales do the rest.

    Args:
        k: `[N, H, G, D]` in cache space.

    Returns:
        float32 `[N, G]`, scaled so that its largest is the largest L2 norm.
    """
    y = k.to(torch.float32).contiguous()  # the order of the sums below must not depend on strides
    norm = torch.ones_like(y[:, :1, :, :1])
    for _ in range(_SINKHORN_ROUNDS):
        spread = y.std(2, keepdim=True)
        columns = y / torch.where(spread > 0, spread, 1.0)
        rows = columns.square().mean((1, 3), keepdim=True).sqrt()
        divisor = torch.where(rows > 0, rows, 1.0)
        y, norm = columns / divisor, norm * divisor
    largest = token_norm(k).amax(1, keepdim=True)
    norm = norm[:, 0, :, 0]
    return norm * (largest / norm.amax(1, keepdim=True))


NORMS: dict[Norm, Callable[[Tensor], Tensor]] = {"l2": token_norm, "sinkhorn": sinkhorn_norm}
"""All norms by name."""
