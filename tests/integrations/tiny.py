"""Tiny random models: how one is built, and what a packed cache should do with it.

Their weights are drawn wide, so that attention looks at some tokens much more than at others and a wrong key or a wrong
mask moves the logits far. They prove plumbing and arithmetic, not accuracy.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from occamkv.integrations.transformers.model import decoders

IMAGE_TOKEN, NEVER_SAID = 90, 10**6
FIRST_WORD = 3  # tokens below it are pad, bos and eos

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Tiny:
    """One architecture: how to build it, and what a packed cache should do with it.

    Args:
        config: Name of its configuration class in transformers.
        model: Name of its model class.
        fields: Fields of the configuration besides `SIZES`.
        drop: Fields of `SIZES` that it does not take.
        full: Layers that are not packed, with words of the reason.
        layers: Number of layers of the cache.
        changes_kv: Whether the model changes K or V between the cache and the attention function.
        inputs: "text", "image" (text with an image) or "encoder" (the text is the decoder's).
        dense: An attention implementation of transformers that reads the same cache dequantized.
        exact: A dtype in which rounding does not depend on the batch, as far as the model runs in it.
        change: What to do to the weights once they are drawn.
        sub: Configurations of parts of the model, instead of `SIZES`.
        own_cache: Name of the cache class that older versions of transformers gave it; no packed cache fits there.
    """

    config: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    full: Mapping[int, str] = field(default_factory=dict)
    layers: int = 2
    changes_kv: bool = False
    inputs: str = "text"
    dense: str = "sdpa"
    exact: torch.dtype = torch.float64
    change: Callable[[nn.Module], None] | None = None
    sub: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own_cache: str = ""

    @property
    def packed(self) -> list[int]:
        """Layers that should be packed."""
        return [layer for layer in range(self.layers) if layer not in self.full]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the model; skip the test where this version of transformers lacks it or gives it a cache of its own."""
        model = self.build_any(dtype)
        if self.has_own_cache(model):
            pytest.skip(f"transformers {transformers.__version__} gives {self.model} its own {self.own_cache}")
        return model

    def build_traceable(self) -> nn.Module:
        """Build the model; skip the test where this version of transformers has its attention outside the interface."""
        model = self.build()
        if not all(part._can_set_attn_implementation() for part in decoders(model)):
            pytest.skip(
                f"transformers {transformers.__version__} has the attention of {self.model} outside the interface"
            )
        return model

    def reads_dequantized(self, model: nn.Module) -> bool:
        """Tell whether the model reads K and V outside the attention function, so that they must be dequantized."""
        decoder = sys.modules[type(model.get_decoder()).__module__]
        return self.changes_kv or not hasattr(decoder, "ALL_ATTENTION_FUNCTIONS")

    def has_own_cache(self, model: nn.Module) -> bool:
        """Tell whether this version of transformers gives the model a cache class of its own."""
        return bool(self.own_cache) and hasattr(sys.modules[type(model).__module__], self.own_cache)

    def build_any(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the model, whatever its cache; skip the test where this version of transformers does not have it."""
        for name in (self.config, self.model):
            if not hasattr(transformers, name):
                pytest.skip(f"transformers {transformers.__version__} has no {name}")
        sizes = {} if self.sub or self.inputs == "encoder" else SIZES
        given = {name: value for name, value in sizes.items() if name not in self.drop}
        config = getattr(transformers, self.config)(**{**given, **self.sub, **self.fields})
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(config).eval()
        draw_weights(model)
        if self.change is not None:
            self.change(model)
        model.generation_config.eos_token_id = NEVER_SAID
        model.generation_config.pad_token_id = 0
        if self.dense == "eager":
            model.set_attn_implementation("eager")  # older versions start with sdpa, which leaves the soft cap out
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the others take no float64
        return model.to(dtype)


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draw all matrices anew, so that they do not depend on the version of transformers."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, 1.3 / weight.shape[-1] ** 0.5, generator=generator)
        elif name.endswith(("sinks", "bias")):
            weight.normal_(0, 0.5, generator=generator)
