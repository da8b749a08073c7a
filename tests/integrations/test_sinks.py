"""Learned sinks and sigmoid output gates: the logits of transformers' own eager code, before and after packing."""

import functools
from dataclasses import replace

import pytest
import transformers
from torch import Tensor, nn

import occamkv
from integrations.architectures import EXPERTS, FULL_AND_SLIDING, TINY
from integrations.steps import difference, prompt, run, words
from integrations.tiny import Tiny
from occamkv import kernels
from some_attention import AVAILABLE

PROMPT, STEPS = 300, 12
METHOD = "oscar_roll"  # INT2
ABOVE_ALL = 10**6
ROUNDING, FIXED_POINT = 2e-5, 5e-3
QUANTIZATION = 1e-2  # what packing moves at least, or agreement within rounding would prove nothing
GRANITE = {**FULL_AND_SLIDING, "attention_multiplier": 0.2}
LINEAR = {
    "layer_types": ["full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def raise_sinks(model: nn.Module) -> None:
    """Sinks that take a good share of the attention."""
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data += 3


SINKS = {
    "gpt_oss": TINY["gpt_oss with learned sinks"],
    "flint": Tiny("FlintConfig", "FlintForCausalLM", {**FULL_AND_SLIDING, **EXPERTS}),
    "granite_swa, a sigmoid of the sum of weights": Tiny("GraniteSWAConfig", "GraniteSWAForCausalLM", GRANITE),
    "granitemoe_swa": Tiny(
        "GraniteMoeSWAConfig",
        "GraniteMoeSWAForCausalLM",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mimo_v2_flash, sinks only under a window": Tiny(
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {**FULL_AND_SLIDING, "v_head_dim": 32, "mlp_layer_types": ["dense", "dense"], "n_routed_experts": 4},
    ),
}
SINKS = {name: replace(tiny, dense="eager", change=raise_sinks) for name, tiny in SINKS.items()}

GATES = {
    "qwen3_next": TINY["qwen3_next with linear layers"],
    "qwen3_5": Tiny("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR),
    "afmoe": Tiny("AfmoeConfig", "AfmoeForCausalLM", {**FULL_AND_SLIDING, **EXPERTS, "num_dense_layers": 2}),
    "hrm_text": Tiny("HrmTextConfig", "HrmTextForCausalLM", {"H_cycles": 1, "L_cycles": 1}),
    "doge, whose mask is made of V": Tiny("DogeConfig", "DogeForCausalLM", {"keep_window_size": 2048}),
}
GATES = {name: replace(tiny, dense="eager") for name, tiny in GATES.items()}
ALL = SINKS | GATES

every_model = pytest.mark.parametrize("name", ALL)
every_sink = pytest.mark.parametrize("name", SINKS)
every_backend = pytest.mark.parametrize("backend", AVAILABLE)


@pytest.fixture
def only(backend, monkeypatch):
    """Caches take this backend."""
    monkeypatch.setattr(kernels, "BACKENDS", (backend,))


def built(name: str) -> nn.Module:
    model = ALL[name].build()
    model.set_attn_implementation("eager")
    return model


def logits(model: nn.Module, name: str, **options) -> Tensor:
    return run(model, prompt(ALL[name], {0: PROMPT}), words(STEPS, seed=3)[None], **options).logits


@functools.cache
def untouched(name: str) -> Tensor:
    """What transformers' own eager code says."""
    return logits(built(name), name)


def skip_where_implementations_differ(name: str) -> None:
    """Skip where transformers itself has one result for eager attention and another for sdpa, which we go by."""
    model = built(name)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
        if difference(logits(model, name), untouched(name)) > ROUNDING:
            pytest.skip(f"eager attention and sdpa of transformers {transformers.__version__} differ for this model")


@every_model
def test_while_nothing_is_packed_the_logits_are_those_of_eager_code(name):
    if name == "doge, whose mask is made of V":
        skip_where_implementations_differ(name)
    model = built(name)
    with occamkv.attach(model, METHOD, min_tokens=ABOVE_ALL) as handle:
        assert difference(logits(model, name), untouched(name)) < ROUNDING
    assert not handle.report().quantized


@every_backend
@every_model
def test_on_packed_tokens_the_logits_are_those_of_eager_code_on_the_same_values(name, backend, only):
    """K and V of the cache, dequantized, go through the model's own eager attention: only the kernels differ."""
    model = built(name)
    with occamkv.attach(model, METHOD) as handle:
        packed = logits(model, name)
    assert all(layer.reads_packed and layer.packed_tokens >= 160 for layer in handle.report().packed_layers)
    assert {layer.backend for layer in handle.report().packed_layers} == {backend}
    with occamkv.attach(model, METHOD) as handle:
        dense = logits(model, name, after_prompt=lambda: model.set_attn_implementation("eager"))
    assert not any(layer.reads_packed for layer in handle.report().layers)
    assert difference(packed, dense) < (ROUNDING if backend == "reference" else FIXED_POINT)
    assert difference(packed[:, 1:], untouched(name)[:, 1:]) > QUANTIZATION


@every_sink
def test_twin_sinks_that_were_left_out_or_exchanged_would_be_seen(name):
    for change in (lambda x: x.fill_(float("-inf")), lambda x: x.copy_(x.flip(0))):
        model = built(name)
        for sinks in (x for n, x in model.named_parameters() if n.endswith("sinks")):
            change(sinks.data)
        other = logits(model, name)
        assert other.isfinite().all() and difference(other, untouched(name)) > 100 * ROUNDING


@every_backend
@pytest.mark.parametrize("value", [float("-inf"), 0.0, 1e4], ids=["none", "softmax off by one", "all of the weight"])
@every_sink
def test_sinks_at_their_ends_are_those_of_eager_code(name, value, backend, only):
    model = built(name)
    for sinks in (x for n, x in model.named_parameters() if n.endswith("sinks")):
        sinks.data.fill_(value)
    expected = logits(model, name)
    assert expected.isfinite().all()
    with occamkv.attach(model, METHOD, min_tokens=ABOVE_ALL):
        assert difference(logits(model, name), expected) < (ROUNDING if backend == "reference" else FIXED_POINT)
    with occamkv.attach(model, METHOD):
        packed = logits(model, name)
    assert packed.isfinite().all()
    if value > 1e3 and not name.startswith("mimo"):  # nothing of K and V is left, packed or not
        assert difference(packed, expected) < ROUNDING
