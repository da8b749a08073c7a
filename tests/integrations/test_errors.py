"""What an error or a change of the weights leaves behind: never a layer that is ahead without a word."""

import pytest
import torch
from torch import Tensor, nn

import occamkv
from integrations.architectures import TINY
from integrations.steps import words
from occamkv import PackedCache
from occamkv.errors import CacheMismatch, OccamError, UnsupportedInput

IDS = words(300)[None]
STEP = words(1, row=1)[None]


def call(model: nn.Module, ids: Tensor, cache, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def test_a_cache_that_was_filled_before_folding_is_refused_after_it():
    model = TINY["llama"].build()
    cache = PackedCache(model)
    call(model, IDS, cache)
    occamkv.fold(model)
    with pytest.raises(CacheMismatch, match="fingerprint"):
        call(model, STEP, cache)
    call(model, IDS, PackedCache(model))


def test_an_error_behind_a_linear_layer_asks_for_a_reset():
    kind = TINY["lfm2 with convolutions"]
    model = kind.build()
    try:
        cache = PackedCache(model)
    except OccamError as error:
        pytest.skip(f"this transformers: {error}")
    last = max(kind.packed)
    call(model, IDS, cache)
    weight = next(p for n, p in model.named_parameters() if f"layers.{last}." in n and "k_proj" in n)
    saved = weight.detach().clone()
    weight.data[:] = float("nan")
    with pytest.raises(UnsupportedInput, match="NaN"):
        call(model, STEP, cache)
    weight.data.copy_(saved)
    with pytest.raises(CacheMismatch, match="reset"):
        call(model, STEP, cache)
    cache.reset()
    call(model, IDS, cache)


def test_a_mask_of_the_wrong_length_is_refused_and_the_cache_stays_good():
    model = TINY["llama"].build()
    cache, intact = PackedCache(model), PackedCache(model)
    short = torch.ones(1, 1, 300, 200, dtype=torch.bool)
    with pytest.raises(UnsupportedInput, match="200 columns, the cache holds 300"):
        call(model, IDS, cache, attention_mask=short)
    assert cache.get_seq_length() == 0
    assert torch.equal(call(model, IDS, cache), call(model, IDS, intact))


@pytest.mark.parametrize(
    "options",
    [{"min_tokens": -1}, {"balance": {7: torch.ones(2, 32)}}, {"balance": {0: torch.ones(2, 32)}}],
    ids=["a negative threshold", "a vector for no layer", "a vector that the method would not use"],
)
def test_arguments_that_would_do_nothing_are_refused(options):
    with pytest.raises(UnsupportedInput):
        PackedCache(TINY["llama"].build(), "oscar", **options)
