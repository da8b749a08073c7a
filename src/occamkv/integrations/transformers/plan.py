"""Which layers of a transformers model are packed, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from occamkv.cache import LayerPlan, Plan
from occamkv.errors import CacheMismatch, NothingQuantized, UnsupportedFormat, UnsupportedInput
from occamkv.formats import check_head_dim
from occamkv.integrations.transformers.fingerprint import fingerprint
from occamkv.integrations.transformers.layer import PackedLayer, Shared
from occamkv.integrations.transformers.model import folded_layers, text_config
from occamkv.integrations.transformers.pin_bias import PinBias, pin_biases
from occamkv.methods import Method, method
from occamkv.methods.auto import Dial
from occamkv.methods.crossing import Statistics, known_rotary

_REASONS = {
    "Sliding": "sliding window: its cache never grows beyond the window",
    "LinearAttentionAndFull": "attention and a linear state in one layer: left to transformers",
    "Linear": "linear attention: a fixed-size state, no K and V",
    "Indexed": "sparse attention with an indexer: left to transformers",
    "Dummy": "no cache of its own: it reads another layer's, or has no attention",
}


def plan_for(config: Any, chosen: Method | str) -> Plan:
    """Return the plan that packs every layer with full attention by one method.

    Args:
        config: A transformers configuration.
        chosen: A method or its name.

    Raises:
        NothingQuantized: The model has no layer that can be packed, and `full` was not asked for.
        UnsupportedFormat: The method does not exist.
    """
    wanted = method(chosen) if isinstance(chosen, str) else chosen
    text = text_config(config)
    folded = folded_layers(text)
    layers = []
    for index, layer in enumerate(_dynamic_layers(text)):
        reason = _not_packed(layer, text)
        if reason is None and wanted.format is not None:
            own = wanted
            if index in folded and own.v_rotation == "hadamard":
                own = own.with_overrides(v_rotation="none")
            layers.append(LayerPlan(index, own))
        else:
            layers.append(LayerPlan(index, method("full"), reason or "method 'full' was asked for"))
    plan = Plan(tuple(layers), text.model_type, fingerprint(text))
    if not plan.packed_layers and wanted.format is not None:
        reasons = sorted({layer.reason or "" for layer in plan.layers}) or ["it has no attention layers with a cache"]
        raise NothingQuantized(
            f"no layer of this {text.model_type or 'model'} can be packed: {'; '.join(reasons)}. "
            "Use it without occamkv; a packed cache would change nothing."
        )
    return plan


def build_layers(
    config: Any,
    plan: Plan,
    *,
    statistics: Mapping[int, Statistics] | None = None,
    min_tokens: int = 0,
    pin_bias: PinBias = None,
) -> list[Any]:
    """Return one cache layer per model layer: ours where the plan packs, transformers' own elsewhere.

    Raises:
        CacheMismatch: The plan was made for another model.
        UnsupportedInput: A layer needs a balance vector that was not given, or cannot be packed.
    """
    text = text_config(config)
    layers = _dynamic_layers(text)
    strange = sorted(set(statistics or {}) - {entry.index for entry in plan.layers if entry.packs})
    if min_tokens < 0 or strange:
        raise UnsupportedInput(
            f"min_tokens is {min_tokens} and balance names layers {strange} that are not packed; "
            "allowed: min_tokens of at least 0, and vectors for packed layers alone."
        )
    check_plan(plan, text, layers)
    dials = {
        each: Dial(each, count) for each, count in Counter(entry.method.budget for entry in plan.layers).items() if each
    }
    shares, biases = shares_layers(text, layers), pin_biases(pin_bias, plan, text)
    for entry in plan.layers:
        if not entry.packs:
            continue
        own = (statistics or {}).get(entry.index)
        _check_statistics(entry, own)
        packed = layers[entry.index] = PackedLayer(
            entry.index,
            entry.method,
            statistics=own,
            min_tokens=min_tokens,
            pack_after_attend=not shares,
            pin_bias=biases.get(entry.index),
        )
        if entry.method.budget is not None:
            packed.choose_by(dials[entry.method.budget])
    shared = Shared("" if text.is_encoder_decoder else fingerprint(text), layers)
    for layer in layers:
        if isinstance(layer, PackedLayer):
            layer.shared = shared
    return layers


def check_plan(plan: Plan, config: Any, layers: Sequence[Any] | None = None) -> None:
    """Refuse a plan that is not for this model.

    Args:
        plan: The plan.
        config: The model's configuration.
        layers: The layers of its cache, if they were made already.

    Raises:
        CacheMismatch: The plan was made for another model.
        UnsupportedInput: The plan packs a layer that cannot be packed.
    """
    text = text_config(config)
    layers = _dynamic_layers(text) if layers is None else layers
    if len(plan.layers) != len(layers) or (plan.fingerprint and plan.fingerprint != fingerprint(text)):
        raise CacheMismatch(
            f"the plan has {len(plan.layers)} layers and fingerprint {plan.fingerprint!r}, the model {len(layers)} and "
            f"{fingerprint(text)!r}. Make a plan for this model."
        )
    for entry in plan.layers:
        reason = _not_packed(layers[entry.index], text) if entry.packs else None
        if reason is not None:
            raise UnsupportedInput(f"the plan packs layer {entry.index}, but it cannot be packed: {reason}.")


def shares_layers(text: Any, layers: Sequence[Any]) -> bool:
    """Tell whether some layers of a model read the K and V of others, so that one K and V is read several times."""
    return bool(getattr(text, "num_kv_shared_layers", 0)) or any("Dummy" in type(each).__name__ for each in layers)


def current_plan(plan: Plan, layers: Sequence[Any]) -> Plan:
    """Return a plan with the methods that its layers have chosen so far."""
    entries = []
    for entry, layer in zip(plan.layers, layers, strict=True):
        held = layer.cache if isinstance(layer, PackedLayer) else None
        entries.append(entry if held is None else LayerPlan(entry.index, held.method, entry.reason))
    return Plan(tuple(entries), plan.model_type, plan.fingerprint)


def _check_statistics(entry: LayerPlan, own: Statistics | None) -> None:
    """Refuse statistics that are missing or that the method would not use."""
    if entry.method.window is not None and entry.method.pins != "none":
        known_rotary(own)
    if entry.method.needs_model and (own is None or own.balance is None):
        raise UnsupportedInput(
            f"method {entry.method} of layer {entry.index} needs what only the model can tell (a balance vector). Pass "
            "the model instead of its configuration, or balance={layer: [H, D] tensor}, or name another method."
        )
    if own is not None and own.balance is not None and not entry.method.needs_model:
        raise UnsupportedInput(
            f"balance has a vector for layer {entry.index}, but its method {entry.method} has "
            f"k_rotation={entry.method.k_rotation!r}. Leave it out, or override k_rotation='balanced'."
        )


def _dynamic_layers(text: Any) -> list[Any]:
    layers: list[Any] = DynamicCache(config=text).layers
    return layers


def _not_packed(layer: Any, text: Any) -> str | None:
    """Return why a layer is left to transformers, or None."""
    if type(layer) is not DynamicLayer:
        name = type(layer).__name__
        window = getattr(layer, "sliding_window", None)
        for word, reason in _REASONS.items():
            if word in name:
                return reason + (f" of {window} tokens" if window else "")
        return f"a cache layer of its own kind ({name}): left to transformers"
    parts = [getattr(text, name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    k_dim = getattr(text, "qk_head_dim", None) or sum(parts)
    v_dim = getattr(text, "v_head_dim", None)
    if k_dim and v_dim and k_dim != v_dim:
        return f"K has head_dim {k_dim} and V {v_dim}; records hold one head_dim"
    head_dim = v_dim or getattr(text, "head_dim", None)
    if head_dim is None:
        width, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
        head_dim = width // heads if width and heads else None
    if head_dim is not None:
        try:
            check_head_dim(head_dim)
        except UnsupportedFormat as error:
            return str(error)
    return None
