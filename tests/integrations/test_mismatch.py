"""Misuse of a packed cache: refused with the way out, and the cache is as it was before."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import occamkv
from integrations.architectures import TINY
from integrations.steps import prompt, words
from occamkv import PackedCache
from occamkv.errors import CacheMismatch, UnsupportedInput

LLAMA = TINY["llama"]
THREE_LAYERS = dataclasses.replace(LLAMA, fields={"num_hidden_layers": 3})
IDS = words(300)[None]
STEP = words(1, row=1)[None]
OTHERS: dict[str, dict[str, Any]] = {
    "a wider model": {"hidden_size": 96},
    "a model with more KV heads": {"num_key_value_heads": 4},
    "a model with larger heads": {"head_dim": 64},
    "a model with more layers": {"num_hidden_layers": 3},
    "a model with fewer layers": {"num_hidden_layers": 1},
    "a model of the same shape with another RoPE": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "a model of the same shape with another norm": {"rms_norm_eps": 1e-3},
}


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


def call(model: nn.Module, ids: Tensor, cache, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **options).logits


def lengths(cache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def other_model(name: str) -> nn.Module:
    model = dataclasses.replace(LLAMA, fields=OTHERS[name]).build()
    PackedCache(model)  # so that it uses our attention function
    return model


@pytest.mark.parametrize("used", [True, False], ids=["a used cache", "a fresh cache"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_the_cache_stays_good_for_its_own(name, used, model):
    cache, intact = PackedCache(model), PackedCache(model)
    if used:
        call(model, IDS, cache)
        call(model, IDS, intact)
    with pytest.raises(CacheMismatch):
        call(other_model(name), STEP if used else IDS, cache)
    assert lengths(cache) == lengths(intact)
    assert torch.equal(call(model, STEP, cache), call(model, STEP, intact))


def test_a_model_with_more_layers_that_reads_dequantized_is_refused(model):
    other = dataclasses.replace(LLAMA, fields=OTHERS["a model with more layers"]).build()
    with pytest.raises(CacheMismatch):
        call(other, IDS, PackedCache(model))


def test_twin_a_copy_of_the_model_may_use_the_cache(model):
    cache, copied = PackedCache(model), copy.deepcopy(model)
    PackedCache(copied)
    call(model, IDS, cache)
    call(copied, STEP, cache)
    assert lengths(cache) == [301, 301]


def test_another_batch_size_is_refused_and_the_cache_stays_good(model):
    cache, intact = PackedCache(model), PackedCache(model)
    call(model, IDS, cache)
    call(model, IDS, intact)
    with pytest.raises(CacheMismatch, match=r"batch size of this call is 2, the cache holds 1.*reset\(\)"):
        call(model, STEP.repeat(2, 1), cache)
    assert torch.equal(call(model, STEP, cache), call(model, STEP, intact))
    cache.reset()
    call(model, IDS.repeat(2, 1), cache)
    assert lengths(cache) == [300, 300]


def nan_in_the_last_layer(model: nn.Module, name: str = "v_proj") -> nn.Parameter:
    weight = getattr(model.model.layers[-1].self_attn, name).weight
    weight.data[0, 0] = float("nan")
    return weight


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("before", [0, 300], ids=["in the prompt", "in a later step"])
def test_nan_in_one_layer_is_an_error_and_the_cache_is_usable_once_it_is_mended(before, projection):
    model = THREE_LAYERS.build()
    cache, intact = PackedCache(model), PackedCache(model)
    if before:
        call(model, IDS, cache)
        call(model, IDS, intact)
    step = STEP if before else IDS
    weight = nan_in_the_last_layer(model, projection)
    saved = THREE_LAYERS.build().model.layers[-1].self_attn.get_submodule(projection).weight.data
    for _ in range(2):
        with pytest.raises(UnsupportedInput, match="NaN or infinite"):
            call(model, step, cache)
        assert lengths(cache) == [before] * 3
    weight.data.copy_(saved)
    assert torch.equal(call(model, step, cache), call(model, step, intact))
    assert lengths(cache) == lengths(intact)


def test_nan_in_one_layer_leaves_the_layers_of_a_copied_cache_at_one_length():
    model = THREE_LAYERS.build()
    original = PackedCache(model)
    call(model, IDS, original)
    copied = copy.deepcopy(original)
    nan_in_the_last_layer(model)
    with pytest.raises(UnsupportedInput, match="NaN or infinite"):
        call(model, STEP, copied)
    assert lengths(copied) == lengths(original) == [300] * 3


def skip_unless_transformers_can_reset(model: nn.Module) -> None:
    own = DynamicCache(config=model.config)
    call(model, IDS, own)
    own.reset()
    if own.layers[0].keys is not None and own.layers[0].keys.shape[-2]:
        pytest.skip(f"transformers {transformers.__version__} leaves tokens in a sliding layer on reset()")


def test_nan_behind_a_sliding_layer_asks_for_a_reset_and_the_cache_is_usable_after_it():
    model = TINY["gemma3"].build()
    cache = PackedCache(model)
    call(model, IDS, cache)
    weight = nan_in_the_last_layer(model)
    with pytest.raises(UnsupportedInput, match="NaN or infinite"):
        call(model, STEP, cache)
    weight.data.copy_(TINY["gemma3"].build().model.layers[-1].self_attn.v_proj.weight.data)
    with pytest.raises(CacheMismatch, match=r"different lengths.*reset\(\)"):
        call(model, STEP, cache)
    skip_unless_transformers_can_reset(model)
    cache.reset()
    assert torch.equal(call(model, IDS, cache), call(model, IDS, PackedCache(model)))


def test_nan_while_generating_under_attach_does_not_stick(model):
    options = {**prompt(LLAMA, {0: 300}), "max_new_tokens": 4, "do_sample": False}
    with occamkv.attach(model):
        expected = model.generate(**options)
        weight = nan_in_the_last_layer(model)
        with pytest.raises(UnsupportedInput, match="NaN or infinite"):
            model.generate(**options)
        weight.data.copy_(LLAMA.build().model.layers[-1].self_attn.v_proj.weight.data)
        assert torch.equal(model.generate(**options), expected)


def test_right_padding_is_refused_with_the_cure(model):
    ids, mask = IDS.repeat(2, 1), torch.ones(2, 300, dtype=torch.int64)
    mask[1, 250:] = 0
    cache = PackedCache(model)
    with pytest.raises(UnsupportedInput, match=r"sequence 1 .*padding_side = 'left'"):
        call(model, ids, cache, attention_mask=mask)
    assert lengths(cache) == [0, 0]
    call(model, ids, cache, attention_mask=mask.flip(1))
    assert lengths(cache) == [300, 300]


def test_a_mask_that_shows_a_dropped_pad_again_is_refused(model):
    mask = torch.ones(2, 300, dtype=torch.int64)
    mask[1, :50] = 0
    cache = PackedCache(model)
    call(model, IDS.repeat(2, 1), cache, attention_mask=mask)
    other = torch.ones(2, 301, dtype=torch.int64)
    other[1, :30] = 0
    with pytest.raises(UnsupportedInput, match="Keep a token's attention_mask the same"):
        call(model, STEP.repeat(2, 1), cache, attention_mask=other)
    assert lengths(cache) == [300, 300]


@pytest.mark.parametrize("trained", ["all layers", "V of the last layer"])
@pytest.mark.parametrize("training", [True, False], ids=["in training mode", "in evaluation mode"])
def test_a_step_with_gradients_is_refused_with_the_cure(training, trained, model):
    cache, intact = PackedCache(model), PackedCache(model)
    call(model, IDS, cache)
    call(model, IDS, intact)
    model.requires_grad_(trained == "all layers")
    model.model.layers[-1].self_attn.v_proj.requires_grad_(True)
    with pytest.raises(UnsupportedInput, match="use_cache=False"):
        model.train(training)(STEP, past_key_values=cache)
    assert lengths(cache) == [300, 300]
    assert torch.equal(call(model.eval(), STEP, cache), call(model, STEP, intact))
