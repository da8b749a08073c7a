"""Tokens that a quantized group should not hold: attention sinks and their kin, told by their norms.

Sinks have short values and often short keys, also in the middle of a text; some keys are far longer than the others.
Either way they ruin the group they share, and their own errors are the ones that attention multiplies most.
"""

import torch
from torch import Tensor

from occamkv.ops.norms import token_norm

BLOCK_TOKENS = 32
"""Tokens that are compared with each other."""

SHORT_KEY = 0.5
"""A K norm below so many medians is low."""

_SHORT_VALUE, _LONG_KEY = 0.4, 1.6  # in units of the median of the block


def outliers(k: Tensor, v: Tensor) -> Tensor:
    """Tell which tokens stick out of their block of 32: V norm below .4, K norm below .5 or above 1.6 medians.

    Args:
        k: `[H, T, D]`, T a multiple of 32.
        v: The same shape.

    Returns:
        float32 `[T]`: the factor, above 1, by which a token breaks a limit; 0 where it breaks none.
    """
    k_norm, v_norm = (token_norm(x[None])[0].unflatten(0, (-1, BLOCK_TOKENS)) for x in (k, v))
    k_ratio, v_ratio = (n / n.median(1, keepdim=True).values.clamp_min(1e-30) for n in (k_norm, v_norm))
    factors = torch.stack(
        (_SHORT_VALUE / v_ratio.clamp_min(1e-9), SHORT_KEY / k_ratio.clamp_min(1e-9), k_ratio / _LONG_KEY)
    ).amax(0)
    return torch.where(factors > 1, factors, 0.0).flatten()


def lowest(k: Tensor, count: int) -> list[int]:
    """Return the numbers of the `count` tokens with the lowest K norm over all heads, ascending. `k`: `[H, T, D]`."""
    order = torch.argsort(token_norm(k[None])[0], stable=True)
    return sorted(order[:count].tolist())
