"""`attach` and `PackedCache`: which caches become packed, and that a model is as before when they are gone."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer

import occamkv
from integrations.architectures import TINY
from integrations.steps import difference, own_layers, prompt, run, words
from occamkv import PackedCache
from occamkv.errors import UnsupportedFormat, UnsupportedInput
from occamkv.integrations.transformers.layer import PackedLayer

LLAMA = TINY["llama"]
IDS = words(300)[None]
ABOVE_ALL = 10**6
ROUNDING, FIXED_POINT = 1e-5, 2e-3


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


def generate(model: nn.Module, **options) -> Tensor:
    return model.generate(**{**prompt(LLAMA, {0: 300}), "max_new_tokens": 12, "do_sample": False, **options})


def is_packed(cache) -> bool:
    kinds = {isinstance(layer, PackedLayer) for layer in own_layers(cache)}
    assert len(kinds) == 1
    return kinds.pop()


def call(model: nn.Module, *args, **options):
    with torch.no_grad():
        return model(*args, **options)


def traces_of(model: nn.Module) -> tuple:
    """Return all that attaching may leave behind in a model."""
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    return hooks, model.config._attn_implementation, [id(part.forward.__func__) for part in model.modules()]


def leave_by_with(model):
    with occamkv.attach(model):
        generate(model)


def leave_by_remove(model):
    handle = occamkv.attach(model)
    generate(model)
    handle.remove()
    handle.remove()


def leave_by_exception(model):
    with pytest.raises(KeyError), occamkv.attach(model):
        generate(model)
        raise KeyError


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "leave",
    [leave_by_with, leave_by_remove, leave_by_exception],
    ids=["the end of a with block", "remove", "an exception in a with block"],
)
def test_a_model_is_as_before_when_the_attachment_is_gone(leave, implementation, model):
    model.set_attn_implementation(implementation)
    before, tokens = traces_of(model), generate(model)
    leave(model)
    assert traces_of(model) == before
    assert torch.equal(generate(model), tokens)
    assert type(call(model, IDS).past_key_values.layers[0]) is DynamicLayer


def test_twin_an_attachment_that_stays_leaves_traces(model):
    before = traces_of(model)
    occamkv.attach(model)
    assert all(a != b for a, b in zip(traces_of(model)[:2], before[:2], strict=True))


def test_the_report_outlives_the_attachment(model):
    with occamkv.attach(model) as handle:
        assert handle.report() is None
        generate(model)
        inside = handle.report()
    assert handle.report() == inside
    assert inside.quantized


def test_a_model_is_attached_only_once(model):
    with occamkv.attach(model) as first:
        for again in (model, model.model):
            with pytest.raises(UnsupportedInput, match=r"already attached.*remove\(\)"):
                occamkv.attach(again)
        generate(model)
        assert first.report().quantized
    with occamkv.attach(model):
        pass


def test_what_is_no_model_is_refused():
    with pytest.raises(UnsupportedInput, match="got a str; allowed: a transformers model or pipeline"):
        occamkv.attach("a model")


def test_a_direct_call_gets_a_packed_cache_and_continues_on_it(model):
    untouched = call(model, IDS).logits
    with occamkv.attach(model) as handle:
        out = call(model, IDS)
        assert is_packed(out.past_key_values)
        assert difference(out.logits, untouched) < ROUNDING
        call(model, words(1)[None], past_key_values=out.past_key_values)
        assert {layer.packed_tokens for layer in handle.report().layers} == {192}  # 4 pins, six groups of 32
        assert {layer.reads_packed for layer in handle.report().layers} == {1}
        assert is_packed(call(model.model, input_ids=IDS).past_key_values)


def test_a_direct_call_of_an_encoder_decoder_packs_only_the_decoders_own_text():
    tiny = TINY["bart, an encoder and a decoder"]
    model, inputs = tiny.build(), prompt(tiny, {0: 300})
    untouched = call(model, **inputs)
    with occamkv.attach(model):
        out = call(model, **inputs)
    assert difference(out.logits, untouched.logits) < ROUNDING
    assert isinstance(out.past_key_values, EncoderDecoderCache)
    assert is_packed(out.past_key_values)
    assert type(out.past_key_values.cross_attention_cache.layers[0]) is DynamicLayer


def test_a_cache_that_holds_tokens_already_is_left_alone(model):
    expected = generate(model)
    used = DynamicCache(config=model.config)
    call(model, IDS[:, :200], past_key_values=used)
    with occamkv.attach(model) as handle, pytest.warns(UserWarning, match="cannot be packed"):
        assert torch.equal(generate(model, past_key_values=used), expected)
    assert not is_packed(used)
    assert handle.report() is None


def test_a_cache_of_another_kind_is_left_alone(model):
    expected = generate(model)
    fixed = StaticCache(config=model.config, max_cache_len=512)
    with occamkv.attach(model) as handle:
        with pytest.warns(UserWarning, match="a StaticCache that cannot be packed"):
            assert torch.equal(generate(model, past_key_values=fixed), expected)
        assert torch.equal(generate(model, use_cache=False), expected)
        assert call(model, IDS, use_cache=False).past_key_values is None
    assert handle.report() is None


def test_an_empty_cache_is_packed_with_or_without_a_configuration(model):
    with occamkv.attach(model):
        for empty in (DynamicCache(), DynamicCache(config=model.config)):
            call(model, IDS, past_key_values=empty)
            assert is_packed(empty)
            assert empty.get_seq_length() == 300


def test_caches_made_while_attached_stay_packed_afterwards(model):
    with occamkv.attach(model):
        cache = call(model, IDS).past_key_values
    logits = call(model, words(1)[None], past_key_values=cache).logits
    assert is_packed(cache)
    assert logits.isfinite().all()


def test_training_under_attach_is_training_as_ever(model):
    def gradient() -> Tensor:
        model.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected = gradient()
    with occamkv.attach(model) as handle:
        assert difference(gradient(), expected) < ROUNDING
    assert handle.report() is None


@pytest.mark.parametrize(
    "give_cache",
    [occamkv.attach, PackedCache, lambda model, name: PackedCache(model.config, name)],
    ids=["attach", "PackedCache of a model", "PackedCache of a configuration"],
)
def test_a_typo_in_a_method_names_the_nearest_and_changes_nothing(give_cache, model):
    before = traces_of(model)
    with pytest.raises(UnsupportedFormat, match="unknown method 'oscra'; did you mean 'oscar'"):
        give_cache(model, "oscra")
    assert traces_of(model) == before


def test_method_full_changes_nothing_and_says_that_it_was_asked_for(model):
    expected = generate(model)
    with occamkv.attach(model, "full") as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(model), expected)
    assert {layer.reason for layer in handle.report().layers} == {"method 'full' was asked for"}
    assert handle.report().packed_layers == []
    assert handle.report().nbytes == handle.report().full_bytes > 0


@pytest.mark.parametrize("implementation", ["occamkv", "sdpa"])
def test_a_cache_made_from_a_configuration_alone_says_how_it_is_read(implementation, model):
    cache = PackedCache(model.config, "oscar")
    model.set_attn_implementation(implementation)
    tokens = words(8, seed=3)[None]
    logits = run(model, prompt(LLAMA, {0: 300}), tokens, past_key_values=cache).logits
    assert {layer.packed_tokens for layer in cache.report().layers} == {256}
    assert {bool(layer.reads_packed) for layer in cache.report().layers} == {implementation == "occamkv"}
    assert ("dequantized" in str(cache.report())) == (implementation == "sdpa")
    from_model = run(model, prompt(LLAMA, {0: 300}), tokens, past_key_values=PackedCache(model, "oscar")).logits
    assert difference(logits, from_model) < FIXED_POINT


@pytest.mark.parametrize("method", ["occam", "occam_small", "occam_quality"])
def test_a_configuration_alone_cannot_have_a_method_that_asks_the_model(method, model):
    with pytest.raises(UnsupportedInput, match=rf"method {method} of layer 0 .*Pass the model.*balance=\{{layer"):
        PackedCache(model.config, method)


def test_a_configuration_alone_cannot_have_the_default(model):
    with pytest.raises(UnsupportedInput, match="or name another method"):
        PackedCache(model.config)
