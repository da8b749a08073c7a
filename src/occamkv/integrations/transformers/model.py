"""The parts of a transformers model that a cache has to do with: the text decoder, its configuration, its attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

FOLDED_FIELD = "occamkv_folded_v"
"""Name of the configuration field that lists the layers whose weights hold V's rotation."""

FUSED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "kv_proj", "in_proj")
"""Names of projections that make V together with something else."""


def text_config(config: Any) -> Any:
    """Return the configuration of the text decoder, which is the part of a multi-modal model that has a cache."""
    return config.get_text_config(decoder=True)


def folded_layers(config: Any) -> frozenset[int]:
    """Return the layers of a model whose weights hold V's rotation; it is noted in the model's configuration."""
    return frozenset(getattr(config, FOLDED_FIELD, ()))


def decoders(model: nn.Module) -> list[PreTrainedModel]:
    """Return the parts of a model that use the text decoder's configuration, outermost first."""
    if getattr(model.config, "is_encoder_decoder", False) and isinstance(model, PreTrainedModel):
        return [model]
    text = text_config(model.config)
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text]


def use_attention(model: nn.Module, name: str) -> str | None:
    """Set the attention implementation of the text decoder; return the one before, or None if it cannot be set."""
    parts = decoders(model)
    if not parts or not all(part._can_set_attn_implementation() for part in parts):
        return None
    before: str = parts[0].config._attn_implementation
    if before != name:
        parts[0].set_attn_implementation(name)
    return before


def attention_modules(decoder: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Yield the attention layers of a decoder with their numbers: modules with a layer number that make V."""
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        names = ("v_proj", *FUSED_NAMES)
        if isinstance(index, int) and any(isinstance(getattr(module, name, None), nn.Module) for name in names):
            yield index, module
