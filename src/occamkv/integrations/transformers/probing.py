"""A short run of a model's decoder whose attention calls are looked at; the model is left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from occamkv.errors import UnsupportedModel
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.layer import Observer, PackedLayer
from occamkv.integrations.transformers.model import decoders, text_config, use_attention
from occamkv.integrations.transformers.plan import build_layers, plan_for

FIRST_TOKENS = 4
"""Attention sinks, which are pinned and tell nothing about the others."""

_RANDOM_TOKENS = 128
_SEED = 0


def random_ids(model: nn.Module, *, tokens: int = _RANDOM_TOKENS, seed: int = _SEED) -> Tensor:
    """Return random token ids `[1, 4 + tokens]` of a model's vocabulary, the same on every machine."""
    decoder: Any = decoders(model)[-1]
    vocabulary = decoder.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (1, FIRST_TOKENS + tokens), generator=generator)


def packable_layers(model: nn.Module) -> list[int]:
    """Return the layers of a model that can be packed."""
    return [entry.index for entry in plan_for(model.config, "kivi").layers if entry.packs]


@torch.no_grad()
def probe(model: nn.Module, ids: Tensor, observers: Mapping[int, Observer], *, offset: int = 0) -> None:
    """Run the decoder on tokens and show each packable layer's queries and cache to its observer.

    Args:
        model: A transformers model.
        ids: Tokens `[1, T]`.
        observers: By layer.
        offset: Position of the first token; above 0 the model is told all positions.

    Raises:
        OccamError: The model's attention cannot be switched to ours.
    """
    attention.register()
    decoder: Any = decoders(model)[-1]
    cache = DynamicCache(config=text_config(model.config))
    cache.layers = build_layers(model.config, plan_for(model.config, "kivi"))
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.observer = observers.get(layer.index)
    ids = ids.to(next(decoder.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if offset:
        inputs["position_ids"] = torch.arange(offset, offset + ids.shape[1], device=ids.device)[None]
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
