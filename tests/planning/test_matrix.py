"""Planned bytes are allocated bytes: every architecture of the model matrix, layer by layer."""

import functools
import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from integrations.architectures import REFUSED, TINY
from integrations.steps import ENCODER_TOKENS, prompt
from occamkv import PackedCache
from occamkv.cache.sizes import ModelSizes
from occamkv.errors import NothingQuantized
from occamkv.integrations.transformers import plan_for
from occamkv.integrations.transformers.sizes import read_sizes
from occamkv.methods import method
from occamkv.planning import Workload, estimate
from occamkv.planning.estimate import at_rest

ALL = TINY | {name: tiny for name, (tiny, _) in REFUSED.items()}
every_architecture = pytest.mark.parametrize("name", ALL)
every_packed_architecture = pytest.mark.parametrize("name", TINY)
lengths_and_batches = pytest.mark.parametrize(("tokens", "batch"), [(70, 2), (200, 1), (515, 1), (515, 2)])


@functools.cache
def made(name: str) -> tuple[nn.Module, ModelSizes]:
    model = ALL[name].build()
    return model, read_sizes(model.config, dtype="float32")


def load_of(name: str, tokens: int, batch: int) -> Workload:
    return Workload(tokens, batch, source=ENCODER_TOKENS if ALL[name].inputs == "encoder" else 0)


def read(name: str, cache: DynamicCache, tokens: int, batch: int) -> DynamicCache | None:
    """Read a prompt into a cache; return that of cross-attention."""
    model, cross = made(name)[0], None
    inputs = prompt(ALL[name], dict.fromkeys(range(batch), tokens))
    takes = "cache_params" if "mamba" in name else "past_key_values"
    inputs[takes] = cache
    if ALL[name].inputs == "encoder":
        cross = DynamicCache()
        inputs[takes] = EncoderDecoderCache(cache, cross)
    with torch.no_grad():
        model(**inputs, use_cache=True)
    return cross


def packed_cache(name: str, chosen: str, tokens: int, batch: int) -> PackedCache:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model's queries could not be read")
        cache = PackedCache(made(name)[0], chosen)
    read(name, cache, tokens, batch)
    for layer in cache.layers:
        if getattr(layer, "cache", None) is not None:
            layer.cache.commit()  # what is due with the next step
    return cache


@every_architecture
def test_the_weights_are_the_models_parameters(name):
    model, sizes = made(name)
    assert sizes.parameters == sum(each.numel() for each in model.parameters())
    assert sizes.weight_bytes == sum(each.nbytes for each in model.parameters())
    assert 0 < sizes.matrix_parameters < sizes.parameters


@lengths_and_batches
@every_packed_architecture
def test_each_layer_holds_what_was_planned(name, tokens, batch):
    cache = packed_cache(name, "oscar", tokens, batch)
    held, load = cache.report().layers, load_of(name, tokens, batch)
    sizes, plan = made(name)[1], plan_for(made(name)[0].config, "oscar")
    planned = at_rest(sizes, plan, load)
    assert [layer.index for layer in held] == [layer.index for layer in sizes.layers]
    cross = [layer.source_values * load.source * batch * 4 for layer in sizes.layers]
    for layer, need, of_source in zip(held, planned, cross, strict=True):
        rest = (0, need.full - of_source) if layer.packs else (need.full - of_source, 0)
        found = (layer.packed_bytes, layer.residual_bytes, layer.pin_bytes)
        assert found == (need.records, need.residual + rest[0], need.pins)
        assert rest[1] == 0
    assert sum(layer.nbytes for layer in held) + sum(cross) == estimate(sizes, plan, load).cache


@pytest.mark.parametrize(("tokens", "batch"), [(20, 2), (200, 1)])
@every_architecture
def test_a_full_cache_holds_what_was_planned(name, tokens, batch):
    model, sizes = made(name)
    cache = DynamicCache(config=model.config)
    cross, load = read(name, cache, tokens, batch), load_of(name, tokens, batch)
    kept = [tensor for each in (cache, cross) if each is not None for layer in each.layers for tensor in tensors(layer)]
    assert sum(each.nbytes for each in kept) == estimate(sizes, plan_for(model.config, "full"), load).cache


def tensors(layer: object) -> list[torch.Tensor]:
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for states in ("conv_states", "recurrent_states"):
        found += getattr(layer, states, {}).values()
    return [each for each in found if each is not None]


@pytest.mark.parametrize("tokens", [70, 515])
@every_packed_architecture
def test_pins_that_are_found_stay_below_their_bound(name, tokens):
    plan = plan_for(made(name)[0].config, "occam_quality")
    load = load_of(name, tokens, 2)
    planned = at_rest(made(name)[1], plan, load)
    for layer, need in zip(packed_cache(name, "occam_quality", tokens, 2).report().layers, planned, strict=True):
        assert need.at_most == layer.packs
        assert layer.packed_bytes <= need.records
        assert layer.pin_bytes <= need.pins
        if layer.packs:
            assert layer.residual_bytes == need.residual


@pytest.mark.parametrize("budget", [2.6, 3.0, 4.2])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next with linear layers", "diffllama, which repeats V"])
def test_a_budget_is_a_bound(name, budget):
    chosen = method("auto", budget=budget)
    model, sizes = made(name)
    cache = packed_cache(name, chosen, 515, 2)
    need = estimate(sizes, plan_for(model.config, chosen), Workload(515, 2))
    packed = sum(layer.packed_bytes for layer in cache.report().layers)
    assert 0.5 * need.records < packed <= need.records
    assert need.at_most


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_packed_is_refused_and_counted_all_the_same(name):
    model, sizes = made(name)
    with pytest.raises(NothingQuantized):
        plan_for(model.config, "oscar")
    assert estimate(sizes, plan_for(model.config, "full"), Workload(200)).cache > 0


def test_layers_that_are_read_outside_the_attention_function_are_told():
    for name, tiny in TINY.items():
        model, sizes = made(name)
        assert {sizes.layers[index].reads_packed for index in tiny.packed} == {not tiny.reads_dequantized(model)}, name


@pytest.mark.parametrize("chunk", [32, 64, 127])
def test_short_pieces_of_a_prompt_wait_as_the_model_made_them_and_as_attention_read_them(chunk):
    model, sizes = made("llama")
    cache, load = PackedCache(model, "oscar"), Workload(6 * chunk + 300, 1, chunk)
    ids = prompt(TINY["llama"], {0: load.context})["input_ids"]
    with torch.no_grad():
        for part in (ids[:, :300], *ids[:, 300:].split(chunk, dim=1)):
            model(part, past_key_values=cache)
    waiting = sum(layer.cache.step.nbytes for layer in cache.layers)
    one_at_a_time = chunk * sizes.layers[0].values * 4
    assert estimate(sizes, plan_for(model.config, "oscar"), load).transient == waiting + one_at_a_time
