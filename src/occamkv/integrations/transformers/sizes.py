"""What a model of transformers keeps of a sequence, from its configuration alone.

The model is built on the meta device, where tensors have shapes and no data, and runs over a few tokens. What its own
code then hands to the cache is counted, so no architecture is described a second time, and none is guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.utils import logging

from occamkv.cache.sizes import LayerSizes, ModelSizes
from occamkv.errors import UnsupportedInput, UnsupportedModel
from occamkv.integrations.transformers.cache import refuse_own_cache
from occamkv.integrations.transformers.model import decoders, text_config, use_attention
from occamkv.integrations.transformers.plan import shares_layers

DTYPES = ("bfloat16", "float16", "float32")

_TOKENS, _NAME = 4, "occamkv_sizes"
_COUNTED = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
_DECODERS, _WITH_ENCODER = ("AutoModelForCausalLM", "AutoModelForImageTextToText"), ("AutoModelForSeq2SeqLM",)


def read_sizes(config: Any, *, dtype: str = "bfloat16") -> ModelSizes:
    """Return what a model of this configuration keeps; nothing of it is loaded.

    Args:
        config: A transformers configuration.
        dtype: Of weights and cache: "bfloat16", "float16" or "float32".

    Raises:
        UnsupportedInput: The dtype is another one.
        UnsupportedModel: A layer cannot be counted, or transformers cannot build or run the model without data.
        NothingQuantized: The model brings a cache class of its own.
    """
    if dtype not in DTYPES:
        raise UnsupportedInput(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    with _quiet():
        model = _build(config, getattr(torch, dtype))
        refuse_own_cache(model)
        own, cross, direct = _run(model)
    text = text_config(model.config)
    layers = tuple(_layer(index, layer, cross, reads=index in direct) for index, layer in enumerate(own.layers))
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        given = stored if isinstance(stored, dict) else stored.to_dict()
        stored = str(given.get("quant_method", "quantized"))
    parameters = list(model.parameters())
    return ModelSizes(
        model_type=config.model_type,
        layers=layers,
        dtype=dtype,
        dtype_bytes=getattr(torch, dtype).itemsize,
        parameters=sum(each.numel() for each in parameters),
        weight_bytes=sum(each.nbytes for each in parameters),
        matrix_parameters=_matrix_parameters(model),
        limit=getattr(text, "max_position_embeddings", None),
        has_encoder=cross is not None,
        packs_late=shares_layers(text, own.layers),
        stored_as=stored,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers say only errors: what it falls back to matters to nobody who runs nothing."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _build(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that the configuration names, or the usual one of its type, on the meta device."""
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    found = [each for each in named if isinstance(each, type) and issubclass(each, PreTrainedModel)]
    for name in _WITH_ENCODER if config.is_encoder_decoder else _DECODERS:
        mapping = getattr(transformers, name)._model_mapping
        if not found and type(config) in mapping:
            found = [mapping[type(config)]]
    if not found:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} has no model that generates text for model_type "
            f"{config.model_type!r}, so its layers cannot be counted."
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = found[0]._from_config(config, dtype=dtype)
    except Exception as error:  # a configuration that does not fit together can make a model raise anything
        raise UnsupportedModel(_told("build", found[0], error)) from error
    return model.eval()


def _told(what: str, kind: type, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return (
        f"transformers cannot {what} {kind.__name__} from its configuration ({type(error).__name__}: {reason}), so "
        "what its layers keep is not known. Compare the configuration with that of the model's publisher."
    )


@torch.no_grad()
def _run(model: PreTrainedModel) -> tuple[DynamicCache, DynamicCache | None, set[int]]:
    """Run a few tokens; return the cache, that of cross-attention, and the layers read through the attention function.

    The attention function here computes nothing, and notes whether it got K and V just as the cache returned them.
    """
    own, direct = DynamicCache(config=text_config(model.config)), set[int]()

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and index < len(own.layers):
            held = own.layers[index]
            if getattr(held, "keys", None) is key and getattr(held, "values", None) is value:
                direct.add(index)
        if query.shape[1] % key.shape[1]:
            raise ValueError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} KV heads")
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    use_attention(model, _NAME)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others look at which expert a token wants
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
    cross: DynamicCache | None = None
    decoder: Any = decoders(model)[0]
    if model.config.is_encoder_decoder:
        cross = DynamicCache()
        inputs |= {"decoder_input_ids": ids, "past_key_values": EncoderDecoderCache(own, cross)}
    else:
        takes = inspect.signature(decoder.forward).parameters
        inputs["past_key_values" if "past_key_values" in takes else "cache_params"] = own
    try:
        decoder(**inputs)
    except Exception as error:  # code that looks at values finds none
        raise UnsupportedModel(_told("run", type(decoder), error)) from error
    return own, cross, direct


def _layer(index: int, layer: Any, cross: DynamicCache | None, *, reads: bool) -> LayerSizes:
    """Count one layer of the cache, after a run over a few tokens."""
    name = type(layer).__name__
    if name not in _COUNTED:
        raise UnsupportedModel(
            f"layer {index} has a cache of its own kind ({name}), which cannot be counted. "
            f"Counted are: {', '.join(_COUNTED)}."
        )
    k, v = getattr(layer, "keys", None), getattr(layer, "values", None)
    indexer = getattr(layer, "indexer_keys", None)
    states = [
        state
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
        if state is not None
    ]
    if name != "DummyLayer" and k is None and not states:
        raise UnsupportedModel(
            f"layer {index} ({name}) put nothing into its cache when the model read text alone, so what it keeps of "
            "other inputs cannot be counted."
        )
    window = getattr(layer, "sliding_window", None)
    k_heads, k_dim, v_heads, v_dim = (0 if x is None else x.shape[at] for x in (k, v) for at in (1, 3))
    return LayerSizes(
        index,
        k_heads=k_heads,
        k_dim=k_dim,
        v_heads=v_heads,
        v_dim=v_dim,
        other_values=0 if indexer is None else indexer.shape[-1],
        most_tokens=None if window is None else window - 1,
        state_bytes=sum(state.nbytes for state in states),
        source_values=_source_values(cross, index),
        reads_packed=reads,
    )


def _source_values(cross: DynamicCache | None, index: int) -> int:
    """Return the values per token of an encoder's text that a layer keeps."""
    if cross is None or index >= len(cross.layers):
        return 0
    held: Any = cross.layers[index]
    return sum(x.shape[1] * x.shape[3] for x in (held.keys, held.values) if x is not None)


def _matrix_parameters(model: PreTrainedModel) -> int:
    """Return how many parameters lie in matrices that are no embedding and no output head."""
    kept = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    kept += [head for head in (model.get_output_embeddings(),) if head is not None]
    left_out = {id(each) for module in kept for each in module.parameters()}
    return sum(each.numel() for each in model.parameters() if each.dim() > 1 and id(each) not in left_out)
