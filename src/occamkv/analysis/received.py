"""Attention received: how much of the softmax each token gets, from queries and keys, a block of queries at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from occamkv.cache.masks import visible
from occamkv.integrations.transformers.tracing import Call

_LOGITS = 2**19
"""Logits of one block of queries, all sequences and heads: 2 MiB as float32."""


def received(call: Call, real: Tensor) -> Tensor:
    """Return the attention that each token gets, summed over the queries that can see it and divided by their number.

    This is alpha_k of Gu et al. (arXiv:2410.10781) wherever all later queries see a token; under a sliding window, and
    with pads, fewer do.

    Args:
        call: What one layer saw.
        real: bool `[B, T]`, False for pads, which are no queries.

    Returns:
        float32 `[B, Hq, T]`; 0 for tokens that no query sees.
    """
    batch, heads, length, _ = call.q.shape
    call = call._replace(k=call.k.to(torch.float32))
    total, count = (torch.zeros(batch, heads, length, device=call.q.device) for _ in range(2))
    step = max(1, _LOGITS // (batch * heads * length))
    for first in range(0, length, step):
        at = torch.arange(first, min(first + step, length), device=call.q.device)
        seen = _seen(call, real, at)
        columns = seen.flatten(0, 2).any(0).nonzero()
        if columns.numel():
            span = slice(int(columns[0]), int(columns[-1]) + 1)
            total[..., span] += _weights(call, seen, at, span).sum(2)
            count[..., span] += seen[..., span].sum(2)
    return total / count.clamp_min(1)


def rows(call: Call, real: Tensor, at: Tensor) -> Tensor:
    """Return the attention rows of some queries, float32 `[B, Hq, n, T]`; a pad's row is 0. `at`: int64 `[n]`."""
    return _weights(call, _seen(call, real, at), at, slice(None))


def is_causal(call: Call, real: Tensor) -> bool:
    """Tell whether causality, window and pads alone decide what a query sees, and nothing is added to its logits."""
    if call.bias is not None or (call.mask is None and not call.causal):
        return False
    if call.mask is None:
        return True
    length = call.q.shape[2]
    step = max(1, _LOGITS // (real.shape[0] * call.mask.shape[1] * length))
    plain = call._replace(mask=None, causal=True)
    for first in range(0, length, step):
        at = torch.arange(first, min(first + step, length), device=real.device)
        expected = _seen(plain, real, at)
        if call.window is not None:
            expected = expected & (torch.arange(length, device=real.device) > at[:, None] - call.window)
        if bool((_seen(call, real, at) != expected).any()):
            return False
        added = call.mask[:, :, at]
        if added.is_floating_point() and bool(added.masked_fill(~visible(added), 0.0).any()):
            return False
    return True


def _seen(call: Call, real: Tensor, at: Tensor) -> Tensor:
    """Return what the queries at these positions see, bool `[B, 1 or Hq, n, T]`; pads see nothing and are not seen."""
    if call.mask is not None:
        seen = visible(call.mask[:, :, at])
    elif call.causal:
        seen = torch.arange(real.shape[1], device=real.device) <= at[:, None]
    else:
        seen = torch.ones((), dtype=torch.bool, device=real.device)
    return seen & real[:, None, at, None] & real[:, None, None, :]


def _weights(call: Call, seen: Tensor, at: Tensor, span: slice) -> Tensor:
    """Return the softmax weights of the queries at these positions on a span of tokens beyond which they see none.

    Args:
        call: What one layer saw.
        seen: What the queries see, `[B, 1 or Hq, n, T]`.
        at: Their positions, int64 `[n]`.
        span: Slice of the T tokens.

    Returns:
        float32 `[B, Hq, n, span]`; a query that sees nothing has zeros.
    """
    reading, k, seen = call.reading, call.k[:, :, span].to(torch.float32), seen[..., span]
    scale = call.q.shape[3] ** -0.5 if reading.scale is None else reading.scale
    queries = (call.q[:, :, at].to(torch.float32) * scale).unflatten(1, (k.shape[1], -1))  # [B, H, g, n, D]
    logits = (queries.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, queries.shape[2:4]).flatten(1, 2)
    if reading.softcap is not None:
        logits = torch.tanh(logits / reading.softcap) * reading.softcap
    for added in (call.bias, call.mask):
        if added is not None and added.is_floating_point():
            logits = logits + added[:, :, at, span].to(torch.float32)
    logits = logits.masked_fill_(~seen, -math.inf)
    if reading.sinks is not None:
        column = reading.sinks.to(logits).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat((logits, column), dim=-1)
    weights = logits.softmax(-1)[..., : k.shape[2]]
    return weights if bool(seen.any(-1).all()) else weights.nan_to_num(0.0)
