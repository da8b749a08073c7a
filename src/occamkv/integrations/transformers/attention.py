"""Our attention function, under one name in transformers' registries of attention and of mask functions.

Both are needed: an attention name without a mask function gets no mask at all, and a left-padded row then attends to
its pads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from occamkv.cache import LayerCache
from occamkv.cache.masks import Seen, visible
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers import compiled
from occamkv.integrations.transformers.fingerprint import fingerprint
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.tensor import PackedTensor
from occamkv.kernels import FullTokens, backend
from occamkv.methods.trial import Reading

NAME = "occamkv"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to packed or plain K and V; the signature is transformers'.

    Args:
        module: The attention layer.
        query: `[B, Hq, T, D]`.
        key: `[B, H, S, D]`, a `PackedTensor` from a packed layer or a plain tensor.
        value: As `key`.
        attention_mask: `[B or 1, 1 or Hq, T, S]`, boolean or additive, or None for causal (bottom right).
        dropout: Only for plain K and V.
        scaling: Softmax scale.
        **options: `softcap`, `s_aux` (learned sink logits), `position_bias`, `is_causal`, and what sdpa takes.

    Returns:
        The output `[B, T, Hq, D]`, and None for the attention weights.
    """
    if torch.compiler.is_compiling():
        handle = compiled.traced.pop(getattr(module, "layer_idx", -1), None)
        if handle is not None:
            compiled.check(query, attention_mask, causal=is_causal(module, options))
            given = (scaling, options.get("softcap"), options.get("s_aux"))
            return compiled.step(query, key, value, attention_mask, handle, *given), None
    if isinstance(key, PackedTensor) and isinstance(value, PackedTensor):
        return _attend_packed(module, query, key.layer, attention_mask, scaling, options), None
    for changed, packed in ((key, value), (value, key)):
        if isinstance(packed, PackedTensor) and not isinstance(changed, PackedTensor):  # the model changed one of them
            _note_pads(packed.layer, attention_mask, packed.layer.cache.new if packed.layer.cache else 0)
    key, value = (x.dense() if isinstance(x, PackedTensor) else x for x in (key, value))
    return _attend_plain(module, query, key, value, attention_mask, dropout, scaling, options), None


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    layer: PackedLayer,
    mask: Tensor | None,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    cache = layer.cache
    if cache is None:
        raise UnsupportedInput(f"layer {layer.index} is not packed ({layer.reason}).")
    before = cache.length - cache.new
    try:
        if mask is not None and mask.shape[-1] != cache.length:
            raise UnsupportedInput(
                f"the attention mask has {mask.shape[-1]} columns, the cache holds {cache.length} slots. Pass an "
                "attention_mask as long as past and new tokens together."
            )
        layer.shared.check_model(getattr(module, "config", None), fingerprint)
        reading = Reading(scaling, options.get("softcap"), options.get("s_aux"))
        if cache.waiting is not None and cache.pin_bias is None:
            k, v = cache.waiting
            seen = None if mask is None else layer.shared.seen(mask, cache, cache.new)
            out = _attend_plain(module, query, k, v, mask, 0.0, scaling, options)
            _observe(layer, cache, query, seen, reading)
            cache.settle()
            return out
        seen = _seen(module, query, layer, cache, mask, options)
        with torch.no_grad():
            _observe(layer, cache, query, seen, reading)
            looked_at = layer.shadow if any(cache.packed_tokens()) else None
            out = cache.attend(query, seen=seen, scale=scaling, softcap=reading.softcap, sinks=reading.sinks)
            out = out.transpose(1, 2).contiguous()
            if looked_at is not None and looked_at.samples():
                full = _attend_exactly(module, query.float(), *looked_at.copy(), mask, scaling, options)
                looked_at.note(out, full, None if seen is None else seen.kept)
        return out
    except Exception:
        cache.forget_step()
        layer.shared.roll_back(min(before, cache.length), failed=layer.index)
        raise


def attend_step(
    query: Tensor, key: Tensor, value: Tensor, layer: PackedLayer, mask: Tensor | None, reading: Reading
) -> Tensor:
    """Take K and V of a step into a layer and attend, for `compiled.step`."""
    with torch.no_grad():
        packed, _ = layer.take(key, value)
        if not isinstance(packed, PackedTensor):
            raise UnsupportedInput(f"layer {layer.index} is not packed ({layer.reason}). Do not compile this model.")
        options = {"softcap": reading.softcap, "s_aux": reading.sinks}
        return _attend_packed(nn.Module(), query, layer, mask, reading.scale, options)


def _observe(layer: PackedLayer, cache: LayerCache, query: Tensor, seen: Seen | None, reading: Reading) -> None:
    """Note the pads of a step, and show it to who looks on."""
    cache.note(seen)
    if layer.observer is not None:
        layer.observer(query, cache, reading)


def _note_pads(layer: PackedLayer, mask: Tensor | None, new: int) -> None:
    if layer.cache is not None and mask is not None and mask.shape[-1] == layer.cache.length:
        layer.cache.note(layer.shared.seen(mask, layer.cache, new))


def _seen(
    module: nn.Module,
    query: Tensor,
    layer: PackedLayer,
    cache: LayerCache,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Seen | None:
    """Return what the queries may see, with a position bias added where the model has one."""
    length, bias = query.shape[2], options.get("position_bias")
    if mask is None and (bias is not None or (length > 1 and not is_causal(module, options))):
        shape = (1, 1, length, cache.length)
        mask = torch.ones(shape, dtype=torch.bool, device=query.device)
        if is_causal(module, options):
            mask = mask.tril(cache.length - length)
    if mask is None:
        return None
    return layer.shared.seen(mask if bias is None else _add_bias(mask, bias), cache, cache.new)


def _add_bias(mask: Tensor, bias: Tensor) -> Tensor:
    """Return an additive mask that holds a position bias where `mask` lets a query see."""
    added = bias.float() if mask.dtype == torch.bool else bias.float() + mask.float()
    return added.masked_fill(~visible(mask), torch.finfo(torch.float32).min)


def is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    """Tell whether an attention call without a mask is causal."""
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True)) if given is None else bool(given)


def _attend_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    """Attend in full precision, `[B, T, Hq, D]`: sdpa, or the reference for soft cap and sinks, which sdpa lacks."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is None and sinks is None:
        rest = {name: value for name, value in options.items() if name not in ("softcap", "s_aux")}
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **rest)[
            0
        ]
        return out
    return _attend_exactly(module, query, key, value, mask, scaling, options)


def _attend_exactly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    """Attend in full precision by the reference, `[B, T, Hq, D]`, sums in float32."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    batch, length, slots = query.shape[0], query.shape[2], key.shape[2]
    at = torch.arange(slots, device=query.device).expand(batch, -1)
    bias = options.get("position_bias")
    if mask is None and (bias is not None or not is_causal(module, options)):
        mask = torch.ones(1, 1, length, slots, dtype=torch.bool, device=query.device)
        mask = mask.tril(slots - length) if is_causal(module, options) else mask
    if bias is not None and mask is not None:
        mask = _add_bias(mask, bias)
    out = backend("reference").attend(
        query,
        q_positions=at[:, slots - length :],
        packed=None,
        full=[FullTokens(key, value, at)],
        scale=scaling,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
    )
    return out.transpose(1, 2).contiguous()


def step_mask(**given: Any) -> Tensor | None:
    """Return the mask that transformers makes, and none for one query that sees all: also while a graph is captured.

    There transformers 5.17 makes one, as long as the cache is in the step that is captured; replays need a longer one.
    """
    queries = given["q_length"] if "q_length" in given else given["cache_position"].shape[0]
    window = given.get("local_size")
    plain = given.get("attention_mask") is None and given.get("allow_is_causal_skip", True)
    if queries == 1 and plain and (window is None or given["kv_length"] < window):
        return None
    mask: Tensor | None = sdpa_mask(**given)
    return mask


def register() -> None:
    """Put our functions into transformers' registries; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, step_mask)
