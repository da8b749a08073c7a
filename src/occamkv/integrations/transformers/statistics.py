"""What a model's queries and keys look like, layer by layer: one short pass over random token ids.

The balance vector is a property of the weights, not of a text: 128 random ids give one as good as the prompt itself
(docs/methods.md has the measurement). So it is taken once per model, and every cache of that model shares it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from occamkv.cache import LayerCache, LayerPlan, Plan
from occamkv.errors import OccamError, UnsupportedModel
from occamkv.integrations.transformers.probing import FIRST_TOKENS, packable_layers, probe, random_ids
from occamkv.integrations.transformers.rotary import key_biases, model_rotaries
from occamkv.methods.crossing import Statistics
from occamkv.methods.trial import Reading
from occamkv.ops.balance import balance_vector, query_moment, variance_in_groups
from occamkv.ops.rope import KeyBias, Rotary, removable

_Key = tuple[tuple[int, int], ...]
_known: WeakKeyDictionary[nn.Module, tuple[_Key, dict[int, Statistics]]] = WeakKeyDictionary()


class _Collector:
    """Adds up what the attention calls that read one layer's keys show. `bias`: what its keys have in common."""

    def __init__(self, bias: KeyBias | None) -> None:
        self.calls, self.bias = 0, bias
        self.moment = self.variance = torch.zeros(())

    def __call__(self, q: Tensor, cache: LayerCache, _reading: Reading) -> None:
        if cache.waiting is None:  # not the first step
            return
        k = cache.waiting[0][:, :, FIRST_TOKENS:].float()
        if not self.calls and self.bias is not None:
            self.bias = removable(self.bias, k, first=FIRST_TOKENS)
        if self.bias is not None:
            k = k - self.bias.rows(torch.arange(FIRST_TOKENS, FIRST_TOKENS + k.shape[2], device=k.device)[None])
        self.variance = variance_in_groups(k)
        self.calls += 1
        self.moment = self.moment + query_moment(q[:, :, FIRST_TOKENS:], kv_heads=k.shape[1])

    def statistics(self) -> Statistics:
        moment = self.moment / self.calls
        return Statistics(balance_vector(moment.diagonal(dim1=1, dim2=2), self.variance), moment, self.bias)


def statistics_for(model: Any, plan: Plan, balance: Mapping[int, Tensor] | None) -> tuple[Plan, dict[int, Statistics]]:
    """Return the statistics of the layers whose method needs them, and the plan to use with them.

    Args:
        model: A model, or a configuration, which has none.
        plan: Which method each layer uses.
        balance: Vectors given by the caller; they replace those of the model.

    Returns:
        The plan is another one, with a warning, if the model cannot be asked: its balanced layers then do not rotate K.
    """
    given = {index: Statistics(vector) for index, vector in (balance or {}).items()}
    if not isinstance(model, nn.Module):
        return plan, given
    turned = _turned(model, plan)
    wanted = {
        entry.index
        for entry in plan.layers
        if entry.packs and entry.method.needs_model and (entry.method.feedback or entry.index not in given)
    }
    biased = _biased(model, plan, beside=wanted)
    if not wanted | biased:
        return plan, _merged(given, {}, turned, plan)
    try:
        found = model_statistics(model)
    except (OccamError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        told = " ".join(str(error).split())[:200]
        warnings.warn(
            f"this model's queries could not be read ({told}); keys are not rotated and not balanced.", stacklevel=3
        )
        layers = [
            _without(entry, keep=entry.index in given) if entry.index in wanted else entry for entry in plan.layers
        ]
        plan = Plan(tuple(layers), plan.model_type, plan.fingerprint)
        return plan, _merged(given, {}, turned, plan)
    own = {index: found[index] for index in wanted | biased if index in found}
    return plan, _merged(given, own, turned, plan)


def _merged(
    given: Mapping[int, Statistics], own: Mapping[int, Statistics], turned: Mapping[int, Rotary], plan: Plan
) -> dict[int, Statistics]:
    """Put together, by layer, a caller's balance vectors, what the model says, and how positions are embedded."""
    merged: dict[int, Statistics] = dict(own)
    for index, one in given.items():
        merged[index] = replace(merged.get(index, one), balance=one.balance)
    for index, rotary in turned.items():
        merged[index] = replace(merged.get(index, Statistics()), rotary=rotary)
    methods = {entry.index: entry.method for entry in plan.layers}
    return {index: one if index in given else one.used_by(methods[index]) for index, one in merged.items()}


def _turned(model: nn.Module, plan: Plan) -> dict[int, Rotary]:
    """Return how the layers with a window, whose pins move, embed positions."""
    moving = {entry.index for entry in plan.layers if entry.packs and entry.method.window is not None}
    return {index: rotary for index, rotary in model_rotaries(model).items() if index in moving} if moving else {}


def _biased(model: nn.Module, plan: Plan, *, beside: set[int]) -> set[int]:
    """Return the layers, but for those that are asked anyway, whose method removes a key bias that they have."""
    removing = {entry.index for entry in plan.layers if entry.packs and entry.method.key_bias == "remove"} - beside
    return removing & set(key_biases(model)) if removing else set()


def _without(entry: LayerPlan, *, keep: bool) -> LayerPlan:
    """Return the entry without what needs the model's queries; `keep` its rotation, whose vector was given."""
    rotation = {} if keep else {"k_rotation": "none"}
    return LayerPlan(entry.index, entry.method.with_overrides(feedback=False, **rotation), entry.reason)


def model_statistics(model: nn.Module, ids: Tensor | None = None) -> dict[int, Statistics]:
    """Return the statistics of every layer of a model that can be packed.

    Args:
        model: A transformers model; it is left as it was.
        ids: Tokens `[1, T]`; default: 128 random ones, seeded, whose result is remembered with the model.

    Raises:
        OccamError: The model's attention cannot be switched to ours, or nothing was read.
    """
    key = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    if ids is None and model in _known and _known[model][0] == key:
        return _known[model][1]
    made = _read(model, random_ids(model) if ids is None else ids)
    if ids is None:
        _known[model] = (key, made)
    return made


def _read(model: nn.Module, ids: Tensor) -> dict[int, Statistics]:
    """Run the decoder on tokens and collect what its attention calls show."""
    biases = key_biases(model)
    collectors = {index: _Collector(biases.get(index)) for index in packable_layers(model)}
    probe(model, ids, collectors)
    silent = [index for index, collector in collectors.items() if not collector.calls]
    if silent:
        raise UnsupportedModel(f"layers {silent} never called attention through the interface")
    return {index: collector.statistics() for index, collector in collectors.items()}
