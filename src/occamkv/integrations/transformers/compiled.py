"""Packed layers under `torch.compile`: a step is one opaque operator, so that `fullgraph=True` finds no break.

While a graph is traced, `Cache.update` hands K and V of the step through and leaves the layer's handle in `traced`,
where our attention function finds it; the operator then does both when the graph runs. Eager code never comes here.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.methods.trial import Reading

if TYPE_CHECKING:
    from occamkv.integrations.transformers.layer import PackedLayer

traced: dict[int, Tensor] = {}
"""Handles of layers between `update` and attention, by layer number; empty when nothing is traced."""

_layers: weakref.WeakValueDictionary[int, PackedLayer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def handle_of(layer: PackedLayer) -> Tensor:
    """Return a new handle of a layer, an int64 scalar: a graph takes it as an input, so caches do not recompile it."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number)


def check(query: Tensor, mask: Tensor | None, *, causal: bool) -> None:
    """Raise `UnsupportedInput` if a step cannot be traced: the operator reads no mask as causal."""
    if mask is None and query.shape[2] > 1 and not causal:
        raise UnsupportedInput("attention without a causal mask is not compiled by occamkv. Call this model eagerly.")


@torch.library.custom_op("occamkv::step", mutates_args=())
def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Take K and V of a step into the cache behind `handle` and attend.

    Args:
        query: `[B, Hq, T, D]`.
        key: `[B, H, T, D]`, the new tokens only.
        value: The same shape.
        mask: As in `attention_forward`.
        handle: The layer's.
        scale: Softmax scale; None: `D ** -0.5`.
        softcap: Logit soft cap.
        sinks: Learned sink logits, `[Hq]`.

    Returns:
        `[B, T, Hq, D]`.
    """
    from occamkv.integrations.transformers.attention import attend_step

    layer = _layers.get(int(handle))
    if layer is None:
        raise UnsupportedInput("the cache that this graph was called with is gone. Keep it alive during the call.")
    return attend_step(query, key, value, layer, mask, Reading(scale, softcap, sinks))


@step.register_fake
def _step_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
