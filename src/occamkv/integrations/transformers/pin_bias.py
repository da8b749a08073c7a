"""Redistribution of attention: a number that is added to the logits of pinned tokens.

Attention sinks take a share of attention that can be given to other tokens, or raised, without training: e^b times the
weight before normalization (ZeroTuning, arXiv:2505.11739, does it for the first token).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from occamkv.cache import Plan
from occamkv.errors import UnsupportedInput

PinBias = float | Mapping[int, Tensor] | None
"""One number for all layers and heads, or float `[Hq]` by layer; None adds nothing."""


def pin_biases(pin_bias: PinBias, plan: Plan, text: Any) -> dict[int, Tensor]:
    """Return what is added in each layer, float32 `[Hq]` or one number.

    Raises:
        UnsupportedInput: A value is not finite, a shape does not fit, or a layer is not packed or pins nothing.
    """
    if pin_bias is None:
        return {}
    pinning = {entry.index for entry in plan.layers if entry.packs and entry.method.pins != "none"}
    if not isinstance(pin_bias, Mapping):
        pin_bias = dict.fromkeys(sorted(pinning), torch.tensor(float(pin_bias)))
    heads = getattr(text, "num_attention_heads", None)
    for index, bias in pin_bias.items():
        fits = isinstance(bias, Tensor) and bias.shape in ((), (heads,)) and bool(bias.isfinite().all())
        if not fits or index not in pinning:
            what = tuple(bias.shape) if isinstance(bias, Tensor) else bias
            raise UnsupportedInput(
                f"pin_bias of layer {index} is {what}; allowed: finite numbers, one or [Hq] = ({heads},), in layers "
                f"that are packed and pin tokens: {sorted(pinning) or 'none, see the method of the plan'}."
            )
    if not pin_bias:
        raise UnsupportedInput("pin_bias was given, but no layer pins tokens. Use a method that does: pins='first:4'.")
    return {index: bias.float() for index, bias in pin_bias.items()}
