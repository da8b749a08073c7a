"""Every architecture under `attach`: first the untouched model's tokens, then the dequantized cache's logits."""

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import occamkv
from integrations.architectures import REFUSED, TINY
from integrations.steps import Run, difference, own_layers, prompt, run, words
from occamkv import CacheReport, PackedCache, kernels
from occamkv.errors import NothingQuantized
from occamkv.integrations.transformers import Attachment
from occamkv.integrations.transformers.attention import attention_forward
from occamkv.kernels import BACKENDS
from some_attention import AVAILABLE

PROMPT, SHORTER, STEPS = 380, 310, 12  # step 4, or 8 with pins, fills the residual: a group of the prompt is due then
SECOND_TURN = 40
ROLLING = "oscar_roll"
DUE = 288  # tokens that are due in the end; found pins are taken out of them
ABOVE_ALL = 10**6
ROUNDING = 2e-5
FIXED_POINT = 5e-3  # between backends, after all layers and steps
pytestmark = pytest.mark.usefixtures("reference_only")  # but for the one test that compares with it

QUANTIZATION = 1e-3  # what packing moves at least, or agreement within rounding would prove nothing

every_method = pytest.mark.parametrize("method", [ROLLING, "occam", "occam_quality"])
every_architecture = pytest.mark.parametrize("name", TINY)
decoders_only = pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.inputs != "encoder"])
text_only = pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.inputs == "text"])


def forced_tokens(*rows: int) -> Tensor:
    return torch.stack([words(STEPS, row=row, seed=3) for row in rows])


@every_architecture
def test_while_nothing_is_packed_the_tokens_are_the_untouched_models(name):
    model = TINY[name].build()
    rows = {0: 300} if TINY[name].inputs == "encoder" else {0: 300, 1: 260}
    options = {**prompt(TINY[name], rows), "max_new_tokens": 24, "do_sample": False}
    untouched = model.generate(**options)
    with attached(model, name, "occam", min_tokens=ABOVE_ALL) as handle:
        tokens = model.generate(**options)
    assert torch.equal(tokens, untouched)
    assert not handle.report().quantized
    assert {layer.index for layer in handle.report().packed_layers if layer.tokens >= 300} == set(TINY[name].packed)


def attached(model: nn.Module, name: str, method: str = ROLLING, **options) -> Attachment:
    """Attach; a model whose queries cannot be read says so."""
    with warnings.catch_warnings():
        if TINY[name].reads_dequantized(model):
            warnings.filterwarnings("ignore", message="this model's queries could not be read")
        else:
            warnings.simplefilter("error")
        return occamkv.attach(model, method, **options)


@functools.cache
def packed_run(name: str, method: str) -> tuple[Run, CacheReport, bool]:
    """Run a prompt and forced tokens; return also whether the model must read K and V dequantized."""
    model = TINY[name].build()
    with attached(model, name, method) as handle:
        ran = run(model, prompt(TINY[name], {0: PROMPT}), forced_tokens(0))
        return ran, handle.report(), TINY[name].reads_dequantized(model)


@every_method
@every_architecture
def test_packed_logits_are_those_of_the_same_cache_read_dequantized(name, method):
    tiny, packed = TINY[name], packed_run(name, method)[0].logits
    model = tiny.build()
    arguments = (model, prompt(tiny, {0: PROMPT}), forced_tokens(0))
    untouched = run(*arguments).logits
    with attached(model, name, method) as handle:
        dense = run(*arguments, after_prompt=lambda: model.set_attn_implementation(tiny.dense)).logits
    assert not any(layer.reads_packed for layer in handle.report().layers)
    assert difference(packed, dense) < ROUNDING
    assert difference(packed[:, :1], untouched[:, :1]) < ROUNDING
    assert difference(packed[:, 1:], untouched[:, 1:]) > QUANTIZATION


@every_architecture
def test_the_default_backend_gives_the_logits_of_the_reference(name, monkeypatch):
    wanted = packed_run(name, "occam")[0].logits
    monkeypatch.setattr(kernels, "BACKENDS", BACKENDS)  # all of them again
    model = TINY[name].build()
    with attached(model, name, "occam") as handle:
        found = run(model, prompt(TINY[name], {0: PROMPT}), forced_tokens(0)).logits
    odd = name.endswith("head_dim 24")  # no multiple of 16
    assert {layer.backend for layer in handle.report().packed_layers} == {"reference" if odd else AVAILABLE[0]}
    assert difference(found, wanted) < FIXED_POINT


@every_method
@every_architecture
def test_the_report_says_what_is_packed_and_why_the_rest_is_not(name, method):
    tiny, (_, report, dequantized) = TINY[name], packed_run(name, method)
    assert [layer.index for layer in report.packed_layers] == tiny.packed
    for layer in report.packed_layers:
        unrotated = dequantized and method != ROLLING
        assert (layer.method, layer.reason) == (method + "+" * unrotated, None)
        assert layer.backend in BACKENDS
        assert layer.bits_per_value < 8
        assert layer.packed_tokens == (DUE - layer.found_pins) // 32 * 32
        assert layer.found_pins <= (4 + 0.02 * DUE if method == "occam_quality" else 0)
        assert layer.packed_bytes > 0
        assert bool(layer.reads_packed) != dequantized
        assert bool(layer.reads_dense) == dequantized
    for index, reason in tiny.full.items():
        if index >= len(report.layers):  # older versions make no cache layer where another layer's is read
            continue
        assert report.layers[index].method == "full"
        assert reason in report.layers[index].reason
        assert reason in str(report)
    assert ("read dequantized" in str(report)) == dequantized


def row_alone_and_padded(name: str, method: str, *, attention: str | None = None) -> tuple[Run, Run]:
    model = TINY[name].build(TINY[name].exact)
    with attached(model, name, method):
        if attention is not None:
            model.set_attn_implementation(attention)
        alone = run(model, prompt(TINY[name], {1: SHORTER}), forced_tokens(1))
        return alone, run(model, prompt(TINY[name], {0: PROMPT, 1: SHORTER}), forced_tokens(0, 1))


@pytest.mark.parametrize("method", [ROLLING, "occam_quality"])
@decoders_only
def test_a_left_padded_row_has_the_logits_and_the_records_of_the_row_alone(name, method):
    alone, padded = row_alone_and_padded(name, method)
    for index in TINY[name].packed:
        of_alone, of_padded = own_layers(alone.cache)[index], own_layers(padded.cache)[index]
        packed = of_alone.cache.packed_tokens()[0]
        assert packed == of_padded.cache.packed_tokens()[1]
        at = slice(PROMPT - SHORTER, PROMPT - SHORTER + packed)
        for x, y in ((of_padded.keys, of_alone.keys), (of_padded.values, of_alone.values)):
            moved = (x[1, :, at] - y[0, :, :packed]).abs() > 1e-6 * y.abs().max()
            assert moved.float().mean() <= (0 if TINY[name].exact == torch.float64 else 1e-3)
    assert difference(padded.logits[1], alone.logits[0]) < ROUNDING


def test_twin_without_a_mask_function_a_left_padded_row_changes():
    name = "occamkv without its mask function"
    AttentionInterface.register(name, attention_forward)
    alone, padded = row_alone_and_padded("llama", ROLLING, attention=name)
    assert difference(padded.logits[1], alone.logits[0]) > QUANTIZATION


def second_turn(model: nn.Module, name: str, rows: dict[int, int]) -> Tensor:
    """Continue a generated text on its cache by many tokens at once; return the logits after them."""
    first = prompt(TINY[name], rows)
    answer = forced_tokens(*rows)
    question = torch.stack([words(SECOND_TURN, row=row, seed=4) for row in rows])
    ids = torch.cat((first["input_ids"], answer, question), dim=1)
    mask = torch.cat((first["attention_mask"], torch.ones_like(answer), torch.ones_like(question)), dim=1)
    cache = run(model, first, answer).cache
    return run(model, {"input_ids": ids, "attention_mask": mask}, answer, past_key_values=cache).logits


@text_only
def test_in_a_second_turn_unpacked_logits_are_the_untouched_models_and_a_padded_row_is_the_row_alone(name):
    model = TINY[name].build(TINY[name].exact)
    untouched = second_turn(model, name, {1: SHORTER})
    with attached(model, name, "occam", min_tokens=ABOVE_ALL):
        assert difference(second_turn(model, name, {1: SHORTER}), untouched) < ROUNDING
    with occamkv.attach(model, ROLLING) as handle:
        alone = second_turn(model, name, {1: SHORTER})
        padded = second_turn(model, name, {0: PROMPT, 1: SHORTER})
    assert handle.report().quantized
    assert difference(alone, untouched) > QUANTIZATION
    assert difference(padded[1], alone[0]) < ROUNDING


@pytest.mark.parametrize("name", [*REFUSED, *(name for name, tiny in TINY.items() if tiny.own_cache)])
def test_a_model_that_cannot_be_packed_is_refused_with_the_reason_and_stays_as_it_was(name):
    tiny, reasons = REFUSED.get(name) or (TINY[name], [])
    model = tiny.build_any()
    routes = [occamkv.attach, PackedCache]
    if tiny.has_own_cache(model):
        reasons = ["cache of its own"]
    elif not reasons:
        pytest.skip(f"this transformers gives {tiny.model} an ordinary cache, no {tiny.own_cache}")
    else:
        routes.append(lambda model: PackedCache(model.config))
    options = {**prompt(tiny, {0: 40}), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(**options)
    for give_cache in routes:
        with pytest.raises(NothingQuantized) as refusal:
            give_cache(model)
        assert all(reason in str(refusal.value) for reason in reasons), refusal.value
    assert torch.equal(model.generate(**options), before)
