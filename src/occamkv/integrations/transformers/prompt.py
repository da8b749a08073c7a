"""A prompt as a model takes it: the decoder's token ids, which of them are pads, and what kind of thing each one is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers.model import text_config

MODALITIES = ("text", "image", "video", "audio")
"""Names of the numbers that processors of transformers write into `mm_token_type_ids`."""


class Prompt(NamedTuple):
    """What one forward pass reads.

    Args:
        inputs: Arguments of the model.
        ids: int64 `[B, T]`, the decoder's token ids.
        real: bool `[B, T]`, False for pads.
        modality: Kind of each token of the first sequence, one of `MODALITIES`.
    """

    inputs: dict[str, Any]
    ids: Tensor
    real: Tensor
    modality: tuple[str, ...]


def read_prompt(model: nn.Module, given: Tensor | Mapping[str, Any]) -> Prompt:
    """Return a prompt, its tensors on the model's device.

    Args:
        model: A transformers model.
        given: Token ids `[B, T]` or `[T]`, which an encoder-decoder model reads with both its parts, or the arguments
            of the model as a tokenizer or processor made them.

    Raises:
        UnsupportedInput: There are no token ids, a sequence is empty, or a mask is not `[B, T]`.
    """
    prefix = "decoder_" if getattr(model.config, "is_encoder_decoder", False) else ""
    if isinstance(given, Tensor):
        both = given[None] if given.dim() == 1 else given
        given = {"input_ids": both, f"{prefix}input_ids": both}
    strange = [name for name in ("past_key_values", "labels") if given.get(name) is not None]
    if strange:
        raise UnsupportedInput(f"the prompt has {' and '.join(strange)}; allowed: a prompt alone, read in one piece.")
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    ids = inputs.get(f"{prefix}input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        raise UnsupportedInput(
            f"the prompt has no token ids (it has: {', '.join(inputs) or 'nothing'}); allowed: integers [B, T] or "
            f"[T], or a mapping with {prefix}input_ids."
        )
    mask = inputs.get(f"{prefix}attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise UnsupportedInput(
            f"{prefix}attention_mask has shape {list(mask.shape)}; allowed: {list(ids.shape)}, 1 for a token and 0 "
            "for a pad."
        )
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not ids.numel() or not bool(real.any(1).all()):
        raise UnsupportedInput(f"the prompt, token ids {list(ids.shape)}, has an empty sequence; allowed: one or more.")
    return Prompt(inputs, ids, real, _modality(model.config, inputs, ids))


def _modality(config: Any, inputs: Mapping[str, Any], ids: Tensor) -> tuple[str, ...]:
    """Name the kind of each token of the first sequence.

    The processor's own numbers come first, then the ids that the configuration names. `token_type_ids` come last, for
    multi-modal models only: with some of them they tell the prefix from the answer.
    """
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        kinds = torch.zeros_like(ids)
        for number, name in enumerate(MODALITIES[1:], start=1):
            for token in _placeholders(config, name):
                kinds = kinds.masked_fill(ids == token, number)
        types = inputs.get("token_type_ids")
        if not bool(kinds.any()) and types is not None and config is not text_config(config):
            kinds = types
    return tuple(MODALITIES[kind] if 0 <= kind < len(MODALITIES) else f"kind {kind}" for kind in kinds[0].tolist())


def _placeholders(config: Any, kind: str) -> list[int]:
    """Return the token ids that stand for parts of an image, a video or a sound."""
    found = (getattr(config, f"{kind}_token_{word}", None) for word in ("id", "index"))
    return [token for token in found if isinstance(token, int)]
