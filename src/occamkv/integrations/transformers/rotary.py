"""How a model embeds positions in its keys, and which of its layers add a bias to all keys.

Nothing is read off class names. The same tokens go through the model twice, at positions 0, 1, ... and further on; a
layer's embedding is known if turning the first keys by one of the model's own tables of frequencies gives the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from occamkv.cache import LayerCache
from occamkv.errors import OccamError
from occamkv.integrations.transformers.model import attention_modules, decoders, text_config
from occamkv.integrations.transformers.probing import packable_layers, probe, random_ids
from occamkv.methods.trial import Reading
from occamkv.ops.rope import KeyBias, Rotary

_TOKENS = 12
_OFFSET = 1000
_MOST_DIFFERENT = 0.05  # mean over channels of error energy by energy; a wrong layout or table gives about 1
_KIND = ("rope_type", "type")
_CHANGES = ("dynamic", "longrope")

_known: WeakKeyDictionary[nn.Module, dict[int, Rotary]] = WeakKeyDictionary()


class _Keys:
    """Keeps the keys of the first step of a layer."""

    def __init__(self) -> None:
        self.k: Tensor | None = None

    def __call__(self, _q: Tensor, cache: LayerCache, _reading: Reading) -> None:
        if cache.waiting is not None:
            self.k = cache.waiting[0].float().cpu()


def model_rotaries(model: nn.Module) -> dict[int, Rotary]:
    """Return how each packable layer embeds positions; layers of which that is not known are missing.

    Positions must be numbers of tokens: embeddings of several axes, and those whose frequencies change with the length
    of the text, are not known.
    """
    if model not in _known:
        _known[model] = _recognized(model)
    return _known[model]


def key_biases(model: nn.Module) -> dict[int, KeyBias]:
    """Return what each layer adds to all keys of a head, all channels in pairs, where it is not zero.

    It is read from `k_proj.bias`; whether it is in K as it stands there, after norms and the like, is for the caller to
    see.
    """
    vectors = dict[int, Tensor]()
    for index, module in attention_modules(decoders(model)[-1]):
        bias, head_dim = getattr(getattr(module, "k_proj", None), "bias", None), getattr(module, "head_dim", None)
        if bias is not None and head_dim and not bias.is_meta and bool(bias.any()):  # offloaded ones have no values
            vectors[index] = bias.detach().float().cpu().unflatten(0, (-1, head_dim))
    rotaries = model_rotaries(model) if vectors else {}
    return {
        index: KeyBias(_every_channel(rotaries[index], vector.shape[1]), rotaries[index].scale * vector)
        for index, vector in vectors.items()
        if index in rotaries
    }


def _every_channel(rotary: Rotary, head_dim: int) -> Rotary:
    """Return the embedding with the channels that it does not turn as pairs of frequency 0."""
    turned = set(torch.cat((rotary.first, rotary.second)).tolist())
    idle = torch.tensor([channel for channel in range(head_dim) if channel not in turned], dtype=torch.int64)
    first, second = idle[: len(idle) // 2 * 2].unflatten(0, (-1, 2)).unbind(1)
    frequencies = torch.cat((rotary.frequencies, torch.zeros(len(first), dtype=torch.float64)))
    return Rotary(frequencies, torch.cat((rotary.first, first)), torch.cat((rotary.second, second)), rotary.scale)


def _recognized(model: nn.Module) -> dict[int, Rotary]:
    text = text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False) or _unsteady(text):
        return {}
    candidates = list(_candidates(decoders(model)[-1]))
    if not candidates:
        return {}
    there: list[Mapping[int, _Keys]] = []
    ids = random_ids(model, tokens=_TOKENS)
    try:
        for offset in (0, _OFFSET):
            there.append({index: _Keys() for index in packable_layers(model)})
            probe(model, ids, there[-1], offset=offset)
    except (OccamError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return {}
    found: dict[int, Rotary] = {}
    for index, near in there[0].items():
        far = there[1][index]
        if near.k is not None and far.k is not None:
            scored = [(_difference(one, near.k, far.k), n) for n, one in enumerate(candidates)]
            score, best = min(scored)
            if score < _MOST_DIFFERENT:
                found[index] = candidates[best]
    turns = any(len(rotary.frequencies) for rotary in found.values())
    return found if turns else {}  # a model that does not heed the positions it is told looks as if it had none


def _candidates(decoder: nn.Module) -> Iterator[Rotary]:
    """Yield what the model's tables of frequencies could mean; the last one: no embedding in this layer."""
    seen = set[tuple[float, ...]]()
    for name, table in decoder.named_buffers():
        if "inv_freq" in name and table.dim() == 1:
            path, _, own = name.rpartition(".")
            scale = float(getattr(decoder.get_submodule(path), own.replace("inv_freq", "attention_scaling"), 1.0))
            key = (scale, *table.double().tolist())
            if key not in seen:
                seen.add(key)
                yield from (Rotary.of(table, interleaved=interleaved, scale=scale) for interleaved in (False, True))
    if seen:
        yield Rotary.of(torch.zeros(0))


def _difference(rotary: Rotary, near: Tensor, far: Tensor) -> float:
    if 2 * len(rotary.frequencies) > near.shape[-1]:
        return float("inf")
    turned = rotary.turn(near, torch.tensor(_OFFSET))
    error, energy = ((x.square()).sum((0, 2)) for x in (turned - far, far))
    return float((error / energy.clamp_min(1e-20)).mean())


def follows_length(config: Any) -> bool:
    """Return whether frequencies are chosen anew as a text grows: the model then looks at positions in each step."""
    return any(name in _KIND and value == "dynamic" for name, value in _fields(config.to_dict()))


def _unsteady(config: Any) -> bool:
    """Return whether positions are more than numbers of tokens."""
    return any(
        (name == "mrope_section" and value is not None) or (name in _KIND and value in _CHANGES)
        for name, value in _fields(config.to_dict())
    )


def _fields(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration, at any depth."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _fields(value)
        else:
            yield name, value
