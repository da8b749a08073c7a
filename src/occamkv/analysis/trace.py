"""The trace: post-RoPE Q, K and V of a real prompt, layer by layer, as the attention function saw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from occamkv.methods.trial import Reading


@dataclass(frozen=True)
class LayerTrace:
    """What one attention layer saw.

    Args:
        index: Number of the layer.
        q: `[B, Hq, T, D]` in model space, in the model's dtype.
        k: `[B, H, T, D]`.
        v: `[B, H, T, D]`.
        reading: Softmax scale, soft cap, learned sink logits.
        window: Sliding window in tokens, None for full attention.
        hidden: What entered the layer, `[B, T, C]`, if it was asked for.
        received: float32 `[B, Hq, T]`: attention that each token got, summed over the queries that see it and divided
            by their number, if it was asked for.
        rows: float32 `[B, Hq, n, T]`: attention rows of `row_positions`, if they were asked for.
        row_positions: Positions of these queries.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    reading: Reading = field(default_factory=Reading)
    window: int | None = None
    hidden: Tensor | None = None
    received: Tensor | None = None
    rows: Tensor | None = None
    row_positions: Sequence[int] = ()


@dataclass(frozen=True)
class Trace:
    """All recorded layers of one forward pass.

    Args:
        layers: In order; layers that were not asked for, or have no attention, are missing.
        ids: Token ids `[B, T]`.
        texts: Text of each token of the first sequence.
        real: bool `[B, T]`, False for pads.
        modality: Name of the kind of each token of the first sequence: "text", "image", "audio", "video".
        model_type: As in the configuration.
        fingerprint: Of the configuration, see `integrations.transformers.fingerprint`.
        layer_count: How many layers the model has.
        positions: Which positions of the prompt were kept; all of Q, K, V, hidden and received have these T.
    """

    layers: tuple[LayerTrace, ...]
    ids: Tensor
    texts: tuple[str, ...]
    real: Tensor
    modality: tuple[str, ...]
    model_type: str
    fingerprint: str
    layer_count: int
    positions: tuple[int, ...]
