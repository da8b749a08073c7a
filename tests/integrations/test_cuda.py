"""Models on the CUDA backend, its kernels run by the emulator: every attention call is the right attention."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import emulated_cuda
from integrations.architectures import TINY
from integrations.comparison import Call, comparing
from integrations.steps import difference, prompt, run, words
from occamkv import PackedCache
from occamkv.evals import controls
from occamkv.integrations.transformers import attention
from occamkv.kernels.cuda.layout import ORDER

pytestmark = [
    pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())),
    pytest.mark.emulator,
]

ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
RAGGED = {0: 330, 1: 200}
LLAMA = TINY["llama"]


@pytest.fixture(autouse=True)
def cuda():
    with emulated_cuda.on_cpu():
        yield


@pytest.fixture
def calls(monkeypatch):
    """Compare every attention call on a packed layer with plain attention; the list fills while a test runs."""
    found: list[Call] = []
    monkeypatch.setattr(attention, "attention_forward", comparing(found))
    yield found
    monkeypatch.undo()
    attention.register()


def assert_read_rightly(calls: list[Call], cache: PackedCache, dtype: torch.dtype = torch.float32) -> None:
    packed = cache.report().packed_layers
    assert packed and all(layer.reads_packed and layer.packed_tokens and not layer.reads_dense for layer in packed)
    assert {layer.backend for layer in packed} == {"cuda"}
    stores = [layer.cache.store for layer in cache.layers if getattr(layer, "cache", None) is not None]
    assert {slab.order for store in stores for slab in store.pool.slabs} == {ORDER}
    assert any(call.packed for call in calls)
    assert max(call.error for call in calls) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("method", ["occam", "oscar", "kivi_k4v3", "occam_small"])
def test_a_ragged_batch_decodes_and_packs_on(method, dtype, calls):
    model = LLAMA.build(dtype)
    cache = PackedCache(model, method)
    model.generate(**prompt(LLAMA, RAGGED), past_key_values=cache, max_new_tokens=70, do_sample=False)
    assert_read_rightly(calls, cache, dtype)
    assert max(cache.layers[0].cache.packed_tokens()) > 256, "packed while decoding"


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "gemma2 with a soft cap",
        "phi3 with head_dim 24",
        "qwen2 with a large key bias",
    ],
)
def test_windows_soft_caps_odd_head_dims_and_key_biases(name, calls):
    tiny = TINY[name]
    model = tiny.build()
    cache = PackedCache(model, "occam")
    softcap = "cap" in name  # which the truth of `calls` does not know
    model.generate(**prompt(tiny, RAGGED), past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert_read_rightly([call._replace(error=0) for call in calls] if softcap else calls, cache)


@pytest.mark.parametrize("name", ["gpt_oss with learned sinks", "gemma2 with a soft cap"])
def test_sinks_and_soft_caps_give_the_logits_of_eager_code_on_the_same_values(name):
    model = TINY[name].build()
    given, tokens = prompt(TINY[name], {0: 330}), words(12, seed=3)[None]
    cache = PackedCache(model, "oscar")
    packed = run(model, given, tokens, past_key_values=cache).logits
    assert {layer.backend for layer in cache.report().packed_layers} == {"cuda"}
    dense = run(
        model,
        given,
        tokens,
        past_key_values=PackedCache(model, "oscar"),
        after_prompt=lambda: model.set_attn_implementation("eager"),
    ).logits
    assert difference(packed, dense) < 2e-3


def test_beams_share_pages_and_part(calls):
    model = LLAMA.build()
    cache = PackedCache(model, "occam")
    model.generate(**prompt(LLAMA, RAGGED), past_key_values=cache, max_new_tokens=40, num_beams=3, do_sample=False)
    assert_read_rightly(calls, cache)


@torch.no_grad()
def test_chunks_of_any_length_a_crop_below_the_residual_and_a_second_turn(calls):
    model, ids = LLAMA.build(), words(700)[None]
    cache, at = PackedCache(model, "occam"), 0
    for count in (200, 9, 130, 5, 8, 1):
        model(ids[:, at : at + count], past_key_values=cache)
        at += count
    packed = cache.layers[0].cache.packed_tokens()
    cache.crop(-170)
    assert cache.layers[0].cache.packed_tokens() < packed and cache.report().layers[0].lossy_crops
    for count in (3, 140, 1, 1):
        model(ids[:, :count], past_key_values=cache)
    assert_read_rightly(calls, cache)
    assert {call.queries for call in calls if call.packed} >= {1, 3, 5, 8, 9, 130, 140}


def test_the_logits_are_about_those_of_the_reference(monkeypatch):
    model, given, tokens = LLAMA.build(), prompt(LLAMA, RAGGED), words(30, seed=3).repeat(2, 1)
    ours = run(model, given, tokens, past_key_values=PackedCache(model, "oscar")).logits
    monkeypatch.setattr("occamkv.kernels.BACKENDS", ("reference",))
    cache = PackedCache(model, "oscar")
    reference = run(model, given, tokens, past_key_values=cache).logits
    assert {layer.backend for layer in cache.report().layers} == {"reference"}
    full = run(model, given, tokens, past_key_values=DynamicCache(config=model.config)).logits
    assert difference(ours, reference) < 0.1 * difference(full, reference)


@torch.no_grad()
def test_the_controls_of_eval_flip_codes_of_v_and_count_bytes():
    model, ids = LLAMA.build(), words(300)[None]
    cache = PackedCache(model, "occam")
    model(ids, past_key_values=cache)
    reading = SimpleNamespace(cache=cache)
    assert controls.bytes_match("occam", reading).passed
    assert controls.flipped_bits_move_logits("occam", model, reading, ids[:, :1]).passed
    store = cache.layers[0].cache.store
    (k, v), size = store.read(0), store.format.sections(32)
    first = size.k_codes + size.k_scale + size.k_minimum
    store.pool.slabs[0].records[0, :, 0, first : first + size.v_codes] ^= 0xFF
    other_k, other_v = store.read(0)
    assert torch.equal(k, other_k) and (v != other_v).any(0).sum(-1).count_nonzero() == 32


def test_twin_a_cache_on_the_reference_is_not_taken_for_one_on_cuda(calls, monkeypatch):
    monkeypatch.setattr("occamkv.kernels.BACKENDS", ("reference",))
    model = LLAMA.build()
    cache = PackedCache(model, "occam")
    model.generate(**prompt(LLAMA, {0: 300}), past_key_values=cache, max_new_tokens=2, do_sample=False)
    with pytest.raises(AssertionError):
        assert_read_rightly(calls, cache)
