"""Folding V's rotation into the weights around it: `W_V <- H W_V`, `W_O <- W_O H` per head (arXiv:2605.19660).

The rotation of V is exact in weights, since attention mixes tokens and never channels. K cannot be folded: RoPE lies
between its projection and the cache.
"""

from torch import Tensor

from occamkv import ops


def fold_value(weight: Tensor, bias: Tensor | None, *, heads: int) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a projection whose output is V rotated per head.

    Args:
        weight: `[H * D, inputs]`.
        bias: `[H * D]` or None.
        heads: KV heads H.

    Returns:
        Both in the dtype that was given; the sums run in float32.
    """
    per_head = weight.unflatten(0, (heads, -1)).transpose(1, 2)
    rotated = ops.hadamard(per_head).transpose(1, 2).flatten(0, 1).to(weight.dtype)
    if bias is None:
        return rotated, None
    return rotated, ops.hadamard(bias.unflatten(0, (heads, -1))).flatten().to(bias.dtype)


def fold_output(weight: Tensor, *, heads: int) -> Tensor:
    """Return the weight of an output projection that takes heads with rotated V.

    Args:
        weight: `[outputs, Hq * D]`.
        heads: Query heads Hq.
    """
    return ops.hadamard(weight.unflatten(1, (heads, -1))).flatten(1).to(weight.dtype)
