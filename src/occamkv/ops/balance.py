"""The balanced rotation: one positive vector d per KV head that evens out what the queries see of K's errors.

With K' = H(d k) and Q' = H(q / d) every product q . k stays what it was. The rotation spreads K's error evenly over
channels, and the queries then weigh each channel alike. The expected squared error of a logit is proportional to
`sum(d^2 v) * sum(u / d^2)`, v the variance of K's channels within a group and u the energy of the queries' channels.
By Cauchy-Schwarz it is least at `d^4 = u / v`, and then neither above that of a plain Hadamard (d = 1) nor above that
of no rotation.

Error feedback uses the same statistics: rounding errors of one channel are made up for by the next ones, as in GPTQ
(Frantar et al., arXiv:2210.17323) and LDLQ (Chee et al., arXiv:2307.13304), with the second moment of the queries.
"""

import torch
from torch import Tensor

from occamkv.ops.hadamard import rotate

VARIANCE_TOKENS = 32
_EPSILON = 1e-6  # some channels of K are exactly dead


def balance_vector(energy: Tensor, variance: Tensor) -> Tensor:
    """Return d, `d_c = (energy_c / variance_c)^(1/4)`, with geometric mean 1.

    The two channels of a RoPE pair (c, c + D/2) get one value, so that d does not depend on positions.

    Args:
        energy: Mean square of the queries of each KV head, `[H, D]`.
        variance: Variance of K within groups of tokens, `[H, D]`.

    Returns:
        float32 `[H, D]`.
    """
    tied = [_tie(t.to(torch.float64)) for t in (energy, variance)]
    scaled = [t / t.mean(-1, keepdim=True).clamp_min(1e-30) for t in tied]
    d = ((scaled[0] + _EPSILON) / (scaled[1] + _EPSILON)).pow(0.25)
    return (d / d.log().mean(-1, keepdim=True).exp()).to(torch.float32)


def _tie(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    if x.shape[-1] % 2:
        return x
    return ((x[..., :half] + x[..., half:]) / 2).repeat(1, 2)


def variance_in_groups(k: Tensor) -> Tensor:
    """Return the variance of each channel within groups of 32 tokens, averaged over groups.

    Args:
        k: `[B, H, T, D]`, T at least 2; a last incomplete group is left out, unless it is the only one.

    Returns:
        float32 `[H, D]`.
    """
    tokens = min(VARIANCE_TOKENS, k.shape[2])
    whole = k.shape[2] // tokens * tokens
    groups = k[:, :, :whole].to(torch.float32).unflatten(2, (-1, tokens))
    return groups.var(3).mean((0, 2))


def query_moment(q: Tensor, *, kv_heads: int) -> Tensor:
    """Return E[q q^T] over the queries that read each KV head, float32 `[H, D, D]`. `q`: `[B, Hq, T, D]`."""
    per_head = q.to(torch.float32).unflatten(1, (kv_heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)
    return per_head.transpose(1, 2) @ per_head / per_head.shape[1]


def feedback_matrix(moment: Tensor, *, hadamard_block: int | None, balance: Tensor | None, damping: float) -> Tensor:
    """Return how the rounding error of a channel is passed on to the channels behind it.

    With U the upper Cholesky factor of the inverse second moment (arXiv:2210.17323, section 3.3), F is U with each row
    divided by its diagonal: after channel c is rounded, channel j > c moves by `-F[c, j]` times the error.

    Args:
        moment: E[q q^T] in model space, `[H, D, D]`.
        hadamard_block: The rotation of K, as in `rotate`.
        balance: d, as in `rotate`.
        damping: Added to the diagonal, in units of its mean.

    Returns:
        F, float32 `[H, D, D]`, zero on and below the diagonal.
    """
    wide = moment.to(torch.float32)
    inverse = None if balance is None else 1 / balance
    for _ in range(2):  # both sides of a symmetric matrix
        wide = rotate(wide[None], hadamard_block=hadamard_block, balance=inverse)[0].transpose(1, 2)
    matrix = wide.to(torch.float64)
    mean = matrix.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30)
    matrix = matrix + damping * mean[:, None, None] * torch.eye(
        matrix.shape[-1], dtype=matrix.dtype, device=wide.device
    )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    passed = upper / upper.diagonal(dim1=1, dim2=2)[..., None]
    return passed.triu(1).to(torch.float32)
