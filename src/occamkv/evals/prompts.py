"""A prompt read once in full precision, then given to any number of packed caches without another forward pass.

A whole-prompt call attends in full precision whatever the cache, so its K and V are those of the full cache; a packed
cache only stores them differently.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from occamkv.cache import Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals.fidelity import step_ends
from occamkv.integrations.transformers import PackedCache
from occamkv.integrations.transformers.attention import NAME, register
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.model import text_config, use_attention


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one call with a whole prompt leaves behind.

    Args:
        model: The model that read it.
        full: Its full-precision cache.
        logits: Logits `[V]` of the first token after the prompt.
    """

    model: PreTrainedModel
    full: DynamicCache
    logits: Tensor

    @staticmethod
    @torch.no_grad()
    def read(model: PreTrainedModel, ids: Tensor) -> Prompt:
        """Read a prompt, `[1, T]`, in one call.

        The model's attention implementation is set to "occamkv" as `PackedCache` does it, so that the prompt and what
        follows it go through the same function.

        Raises:
            UnsupportedInput: `ids` is not one prompt of at least one token.
        """
        _check_ids(ids)
        register()
        use_attention(model, NAME)
        full = DynamicCache(config=text_config(model.config))
        logits = model(ids, past_key_values=full, use_cache=True, logits_to_keep=1).logits
        return Prompt(model, full, logits[0, -1])

    def cache(self, plan: Plan | None) -> Cache:
        """Return a cache of its own in the state in which the whole-prompt call would have left it.

        Args:
            plan: How it is packed; None for a copy of the full cache.

        Raises:
            CacheMismatch: The plan belongs to another model.
            UnsupportedInput: A token of the prompt cannot be packed.
        """
        if plan is None:
            return copy.deepcopy(self.full)
        packed = PackedCache(self.model, plan=plan)
        layers: list[Any] = self.full.layers
        for layer, full in zip(packed.layers, layers, strict=True):
            if not isinstance(layer, PackedLayer):
                vars(layer).update(copy.deepcopy(vars(full)))  # the layer stays: the packed layers hold links to it
                continue
            layer.update(full.keys, full.values)
            if layer.cache is not None:
                layer.cache.settle()
        return packed


@torch.no_grad()
def continue_with(
    model: PreTrainedModel, cache: Cache, ids: Tensor, first_logits: Tensor, *, like: Plan | None = None
) -> Tensor:
    """Return logits `[n, V]` that predict each of the tokens that follow a prompt, whatever the model would have said.

    The tokens go through the cache in steps that equal token-by-token decoding; the last one is not read.

    Args:
        model: The model that made the cache.
        cache: A cache of `Prompt.cache`; it grows.
        ids: The tokens after the prompt, `[1, n]`.
        first_logits: The prompt's logits, `[V]`.
        like: Take the steps of this plan, to compare another cache with one of that plan; default: the cache's own.

    Raises:
        UnsupportedInput: `ids` is not one text of at least one token.
    """
    _check_ids(ids)
    parts, prompt = [first_logits[None]], cache.get_seq_length()
    start = prompt
    plan = getattr(cache, "plan", Plan(())) if like is None else like
    for end in step_ends(plan, start=start, end=prompt + ids.shape[1] - 1):
        step = ids[:, start - prompt : end - prompt]
        parts.append(model(step, past_key_values=cache, use_cache=True).logits[0])
        start = end
    return torch.cat(parts)


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    cache: Cache,
    first_logits: Tensor,
    n: int,
    stop_ids: Collection[int] = (),
    *,
    until: Callable[[list[int]], bool] | None = None,
) -> list[int]:
    """Return the most likely continuation of a prompt.

    Args:
        model: The model that made the cache.
        cache: A cache of `Prompt.cache`; it grows.
        first_logits: The prompt's logits, `[V]`.
        n: At most so many tokens.
        stop_ids: Tokens that end it; they are not returned.
        until: Asked after each token with all of them; True ends it too.
    """
    tokens: list[int] = []
    logits = first_logits
    while len(tokens) < n:
        token = int(logits.argmax())
        if token in stop_ids:
            break
        tokens.append(token)
        if until is not None and until(tokens):
            break
        if len(tokens) < n:
            step = torch.tensor([[token]], device=logits.device)
            logits = model(step, past_key_values=cache, use_cache=True).logits[0, -1]
    return tokens


def _check_ids(ids: Tensor) -> None:
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise UnsupportedInput(f"ids {tuple(ids.shape)}; allowed: one text of at least one token, [1, T].")
