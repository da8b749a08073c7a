"""Token Norm Imbalance: how unequal the norms of tokens are that share a quantized group (arXiv:2605.19660)."""

from __future__ import annotations

import torch
from torch import Tensor

from occamkv.ops import apply_grid, dequantize, group_range, quantize, round_metadata, token_norm

GROUP = 32
"""Tokens of a group, as in the paper."""


def over_median(norms: Tensor) -> Tensor:
    """Return norms `[..., T]` in units of their median over the tokens."""
    return norms / norms.median(-1, keepdim=True).values.clamp_min(1e-30)


def layer_norms(x: Tensor) -> Tensor:
    """Return the L2 norm of each token over all heads, relative to the median, float32 `[T]`. `x`: `[H, T, D]`."""
    return over_median(token_norm(x[None])[0])


def head_norms(x: Tensor) -> Tensor:
    """Return the L2 norm of each token in each head, relative to the head's median, float32 `[H, T]`."""
    return over_median(token_norm(x[:, None]))


def scaled_norms(k: Tensor) -> Tensor:
    """Return what Omni-Token Scaling leaves: the norm of each head after the norm over all heads was divided out.

    With one KV head nothing but 1 is left, with several the imbalance between heads.

    Args:
        k: `[H, T, D]`.

    Returns:
        float32 `[T]`: each head's norm relative to its median, mean over the heads.
    """
    return over_median(token_norm(k[:, None]) / token_norm(k[None]).clamp_min(1e-30)).mean(0)


def group_ratios(norms: Tensor) -> Tensor:
    """Return the largest over the smallest norm of each whole group of 32 tokens, `[T // 32]`. `norms`: `[T]`."""
    groups = norms[: len(norms) // GROUP * GROUP].unflatten(0, (-1, GROUP))
    return groups.amax(1) / groups.amin(1).clamp_min(1e-30)


def error_bound(k: Tensor, *, bits: int) -> Tensor:
    """Return the paper's lower bound of a group's error: `(||k_m|| - ||k_n||)^2 / (12 (2^b - 1)^2)`.

    m and n are the tokens with the largest and the smallest norm of the group. It follows from Bennett's step^2 / 12,
    since the ranges of all channels together span at least the distance of these two tokens.

    Args:
        k: `[H, T, D]`.
        bits: Bits of a code.

    Returns:
        Squared error of a token, all channels added, float32 `[H, T // 32]`.
    """
    norms = token_norm(_groups(k)[:, :, None].flatten(0, 1)).unflatten(0, (k.shape[0], -1))
    return (norms.amax(-1) - norms.amin(-1)).square() / (12 * (2**bits - 1) ** 2)


def measured_error(k: Tensor, *, bits: int) -> Tensor:
    """Return the error of per-channel codes over the whole range of each group (KIVI's), as `error_bound` counts it."""
    groups = _groups(k)
    low, high = apply_grid(*group_range(groups, axis="channel", group=GROUP), bits=bits, grid="minmax")
    meta = round_metadata(low, high, bits=bits, metadata_bits=32)
    codes = quantize(groups, scale=meta.scale, minimum=meta.minimum, bits=bits)
    error = groups - dequantize(codes, scale=meta.scale, minimum=meta.minimum)
    return error.square().sum(-1).mean(-1)


def key_cosine(k: Tensor) -> Tensor:
    """Return `cos(k_t, mean k)`, mean over the heads, float32 `[T]`: near 0 or below for many sinks (KeyDiff)."""
    wide = k.to(torch.float32)
    return torch.nn.functional.cosine_similarity(wide, wide.mean(1, keepdim=True), dim=-1).mean(0)


def _groups(k: Tensor) -> Tensor:
    """Cut K `[H, T, D]` into whole groups, float32 `[H, T // 32, 32, D]`."""
    return k[:, : k.shape[1] // GROUP * GROUP].to(torch.float32).unflatten(1, (-1, GROUP))
