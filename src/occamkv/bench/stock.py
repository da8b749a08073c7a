"""What torch itself offers for attention with grouped heads, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from occamkv.bench.timing import Contestant

GQA_BF16 = "sdpa_gqa_bf16"
"""What transformers calls today for a model in bfloat16."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def gqa(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """SDPA with `enable_gqa`: q `[B, Hq, Tq, D]`, k and v `[B, H, T, D]`, seen bool `[Tq, T]` or None for all."""
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def folded(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """SDPA with the query heads of a KV head as its rows, so that K and V are read once."""
    rows, mask = _fold(q, k.shape[1], seen)
    return scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def manual(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Matmul, softmax, matmul on folded queries."""
    rows, mask = _fold(q, k.shape[1], seen)
    logits = (rows * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(-1) @ v).reshape(q.shape)


def _fold(q: Tensor, kv_heads: int, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
    batch, heads, queries, head_dim = q.shape
    mask = None if seen is None else seen.repeat(heads // kv_heads, 1)
    return q.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim), mask


FORMULATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "sdpa_gqa": gqa,
    "sdpa_folded": folded,
    "manual_folded": manual,
}


def causal(queries: int, tokens: int) -> Tensor | None:
    """Return what the newest `queries` tokens see, bool `[Tq, T]`; None for a single one, which sees all."""
    return None if queries == 1 else torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)


def stock_contestants(q: Tensor, k: Tensor, v: Tensor) -> list[Contestant]:
    """Return every formulation in every dtype; a dtype's copies of K and V are shared."""
    seen = causal(q.shape[2], k.shape[2])
    made = []
    for label, dtype in DTYPES.items():
        given_q, given_k, given_v = (x.to(dtype) for x in (q, k, v))
        for name, function in FORMULATIONS.items():
            made.append(Contestant(f"{name}_{label}", partial(function, given_q, given_k, given_v, seen)))
    return made


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention in float64, `[B, Hq, Tq, D]`, one KV head at a time."""
    seen = causal(q.shape[2], k.shape[2])
    group = q.shape[1] // k.shape[1]
    heads = zip(q.double().split(group, dim=1), k.split(1, dim=1), v.split(1, dim=1), strict=True)
    return torch.cat([manual(q, k.double(), v.double(), seen) for q, k, v in heads], dim=1)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return the relative L2 error."""
    return float((found.double() - truth).norm() / truth.norm())
