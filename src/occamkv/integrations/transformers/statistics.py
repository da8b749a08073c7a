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
from transformers import DynamicCache, EncoderDecoderCache

from occamkv.cache import LayerCache, LayerPlan, Plan
from occamkv.errors import OccamError, UnsupportedModel
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.model import decoders, text_config, use_attention
from occamkv.integrations.transformers.plan import build_layers, plan_for
from occamkv.methods.crossing import Statistics
from occamkv.methods.trial import Reading
from occamkv.ops.balance import balance_vector, query_moment, variance_in_groups

RANDOM_TOKENS = 128
_FIRST_TOKENS = 4  # attention sinks, which are pinned and tell nothing about the others
_SEED = 0

_Key = tuple[tuple[int, int], ...]
_known: WeakKeyDictionary[nn.Module, tuple[_Key, dict[int, Statistics]]] = WeakKeyDictionary()


class _Collector:
    """Adds up what the attention calls that read one layer's keys show."""

    def __init__(self) -> None:
        self.calls = 0
        self.moment = self.variance = torch.zeros(())

    def __call__(self, q: Tensor, cache: LayerCache, _reading: Reading) -> None:
        if cache.waiting is None:  # not the first step
            return
        k = cache.waiting[0]
        self.calls += 1
        self.moment = self.moment + query_moment(q[:, :, _FIRST_TOKENS:], kv_heads=k.shape[1])
        self.variance = variance_in_groups(k[:, :, _FIRST_TOKENS:])

    def statistics(self) -> Statistics:
        moment = self.moment / self.calls
        return Statistics(balance_vector(moment.diagonal(dim1=1, dim2=2), self.variance), moment)


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
    wanted = {
        entry.index
        for entry in plan.layers
        if entry.packs and entry.method.needs_model and (entry.method.feedback or entry.index not in given)
    }
    if not isinstance(model, nn.Module) or not wanted:
        return plan, given
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
        return Plan(tuple(layers), plan.model_type, plan.fingerprint), given
    own = {index: found[index] for index in wanted if index in found}
    vectors = {index: replace(own.get(index, one), balance=one.balance) for index, one in given.items()}
    return plan, {**own, **vectors}


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


def random_ids(model: nn.Module, *, tokens: int = RANDOM_TOKENS, seed: int = _SEED) -> Tensor:
    """Return random token ids `[1, 4 + tokens]` of a model's vocabulary, the same on every machine."""
    decoder: Any = decoders(model)[-1]
    vocabulary = decoder.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (1, _FIRST_TOKENS + tokens), generator=generator)


@torch.no_grad()
def _read(model: nn.Module, ids: Tensor) -> dict[int, Statistics]:
    """Run the decoder on tokens, with a cache whose layers show queries and keys."""
    attention.register()
    decoder: Any = decoders(model)[-1]
    cache = DynamicCache(config=text_config(model.config))
    cache.layers = build_layers(model.config, plan_for(model.config, "kivi"))
    collectors = {layer.index: _Collector() for layer in cache.layers if isinstance(layer, PackedLayer)}
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.observer = collectors[layer.index]
    ids = ids.to(next(decoder.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": ids, "past_key_values": EncoderDecoderCache(cache, DynamicCache())}
    before, modes = use_attention(model, attention.NAME), {part: part.training for part in decoder.modules()}
    if before is None:
        raise UnsupportedModel(f"{type(model).__name__} has attention outside transformers' attention interface")
    try:
        decoder.eval()(**inputs)
    finally:
        use_attention(model, before)
        for part, training in modes.items():
            part.training = training
    silent = [index for index, collector in collectors.items() if not collector.calls]
    if silent:
        raise UnsupportedModel(f"layers {silent} never called attention through the interface")
    return {index: collector.statistics() for index, collector in collectors.items()}
