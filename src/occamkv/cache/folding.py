"""Folding into weights: V's rotation, `W_V <- H W_V`, `W_O <- W_O H` per head (arXiv:2605.19660), and the balance of K.

The rotation of V is exact in weights, since attention mixes tokens and never channels. K's rotation cannot be folded:
RoPE lies between its projection and the cache. Its balance can, `W_K <- d W_K`, `W_Q <- W_Q / d`, since the two
channels that RoPE turns into each other have one d.
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


def scale_heads(weight: Tensor, vector: Tensor, *, heads: int) -> Tensor:
    """Return the weight `[heads * D, inputs]` or bias `[heads * D]` of a projection with its channels scaled.

    Args:
        weight: Weight or bias.
        vector: `[H, D]`, H a divisor of `heads`: each row serves `heads / H` heads in a row.
        heads: Heads that the projection makes.
    """
    scale = vector.repeat_interleave(heads // vector.shape[0], dim=0).flatten().to(weight.device)
    wide = weight.float() * (scale if weight.dim() == 1 else scale[:, None])
    return wide.to(weight.dtype)
