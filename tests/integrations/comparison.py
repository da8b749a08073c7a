"""Every call of our attention function compared with plain attention over the same cache, dequantized.

It holds inside beam search, sampling or speculative decoding, where two runs may part at a near tie.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from integrations.steps import difference
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.tensor import PackedTensor


class Call(NamedTuple):
    """One attention call: queries in it, packed tokens that it read, and how far it was from plain attention."""

    queries: int
    packed: int
    error: float


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attend in float64: q `[B, Hq, Tq, D]`, k and v `[B, H, S, D]`, boolean mask; return `[B, Tq, Hq, D]`."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    logits = (query @ key.mT * scaling).masked_fill(~mask, float("-inf"))
    return (logits.softmax(dim=-1).nan_to_num() @ value).transpose(1, 2)


def comparing(
    calls: list[Call], ours: Callable[..., Any] = attention.attention_forward
) -> Callable[..., tuple[Tensor, None]]:
    """Return an attention function that does what `ours` does and notes each call that reads a packed layer."""

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
        arguments = (module, query, key, value, attention_mask, dropout, scaling)
        if not isinstance(key, PackedTensor):
            return ours(*arguments, **options)
        cache = key.layer.cache
        packed, reads = sum(cache.packed_tokens()), cache.dense_reads
        expected = plain_attention(query, key.dense(), value.dense(), attention_mask, scaling)
        cache.dense_reads = reads
        out, weights = ours(*arguments, **options)
        real = torch.ones_like(out[..., :1, :1], dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.any(dim=(1, 3))[:, :, None, None]
        calls.append(Call(query.shape[2], packed, difference(out * real, expected * real)))
        return out, weights

    return attend
