"""Packed caches on a device that is not the CPU: nothing is made on the wrong one (see `pretend_device`)."""

import functools

import pytest
import torch
import transformers

import pretend_device
from integrations.architectures import TINY
from integrations.steps import prompt, words
from occamkv import PackedCache, kernels
from occamkv.kernels import StepLayer
from occamkv.methods import method
from pretend_device import NAME

RAGGED = {0: 330, 1: 200}
FORMS = {
    **{name: method(name) for name in ("occam_quality", "turboquant", "ott", "kvarn", "rtn")},
    "a window with pins": method("oscar", window=256, pins="at:0,7,130"),
}


@functools.cache
def missing() -> str | None:
    """Why models cannot run on the device here, or None."""
    try:
        TINY["llama"].build().to(NAME)(words(4)[None].to(NAME))
    except RuntimeError as error:  # autocast for every device, by its name
        return f"transformers {transformers.__version__}: {error}"
    return None


@pytest.fixture(autouse=True)
def device():
    with pretend_device.present():
        if missing():
            pytest.skip(missing())
        yield


def given(name: str) -> dict[str, torch.Tensor]:
    return {key: x.to(NAME) for key, x in prompt(TINY[name], RAGGED).items()}


def assert_on_device(cache: PackedCache) -> None:
    stores = [layer.cache.store for layer in cache.layers if getattr(layer, "cache", None) is not None]
    tensors = [x for s in stores for x in (s.residual_k, s.pin_v, *(t for slab in s.pool.slabs for t in slab.tensors))]
    assert tensors and {x.device.type for x in tensors} == {NAME}
    assert cache.report().quantized


@pytest.mark.emulator
@pytest.mark.parametrize("form", FORMS)
def test_methods(form):
    model = TINY["llama"].build().to(NAME)
    cache = PackedCache(model, FORMS[form])
    model.generate(**given("llama"), past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert_on_device(cache)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 64}], ids=["beams", "chunks"])
def test_what_generate_offers(options):
    model = TINY["qwen2 with a large key bias"].build().to(NAME)
    cache = PackedCache(model, "occam", verify=not options.get("num_beams"))
    inputs = given("qwen2 with a large key bias")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=10, do_sample=False, **options)
    assert_on_device(cache)


@torch.no_grad()
def test_crop_choice_of_sequences_and_dense_reads():
    model = TINY["llama"].build().to(NAME)
    cache = PackedCache(model, "occam")
    model(words(330).repeat(2, 1).to(NAME), past_key_values=cache)
    cache.crop(-170)
    cache.batch_select_indices(torch.tensor([1, 1, 0]).to(NAME))
    model(words(5).repeat(3, 1).to(NAME), past_key_values=cache)
    assert cache.layers[0].keys.device.type == NAME
    assert_on_device(cache)


def test_a_bias_of_pins_lies_where_whole_steps_read_it(monkeypatch):
    layers: list[StepLayer] = []
    monkeypatch.setattr(kernels.backend("reference"), "stepper", layers.append)
    model = TINY["llama"].build().to(NAME)
    cache = PackedCache(model, "occam", pin_bias=0.5)
    model.generate(words(200)[None].to(NAME), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert layers and all(layer.pins.logit_bias.device.type == NAME for layer in layers)


def test_twin_a_cache_on_the_cpu_is_not_on_the_device():
    model = TINY["llama"].build()
    cache = PackedCache(model, "occam")
    model.generate(**prompt(TINY["llama"], RAGGED), past_key_values=cache, max_new_tokens=2, do_sample=False)
    with pytest.raises(AssertionError):
        assert_on_device(cache)
