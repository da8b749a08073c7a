"""A traced pass shows what attention saw, with the model's own attention, and leaves the model as it was."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import occamkv
from integrations.architectures import REFUSED, TINY
from integrations.steps import ENCODER_TOKENS, difference, prompt, words
from integrations.tiny import SIZES, Tiny
from occamkv.errors import UnsupportedInput, UnsupportedModel
from occamkv.integrations.transformers import tracing
from occamkv.integrations.transformers.model import decoders, text_config
from occamkv.integrations.transformers.prompt import read_prompt
from occamkv.integrations.transformers.tracing import Call, trace_attention

LLAMA, T5, BART = (TINY[name] for name in ("llama", "t5, an encoder and a decoder", "bart, an encoder and a decoder"))
LATENT = "deepseek_v3 with latent attention"
OUTSIDE = ["falcon outside the attention interface", "bloom outside the attention interface"]
ALL = {name: tiny for name, tiny in TINY.items() if name not in OUTSIDE} | {
    name: REFUSED[name][0] for name in ("mistral with a window in every layer", LATENT)
}
PADDED = {0: 45, 1: 38}
LONGER_THAN_THE_WINDOW = 45


def build(tiny: Tiny) -> nn.Module:
    """Build a model whose attention can be traced in this version of transformers, or skip the test."""
    model = tiny.build()
    if not all(part._can_set_attn_implementation() for part in decoders(model)):
        pytest.skip(f"{type(model).__name__} of this transformers has attention outside the interface")
    return model


def traced(model: nn.Module, inputs: Any, **options: Any) -> dict[int, Call]:
    calls: dict[int, Call] = {}
    trace_attention(model, inputs, lambda call: calls.update({call.layer: call}), **options)
    return calls


def by_projections(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k and v of each layer: what the projections put out, turned by transformers' own function."""
    seen: dict[str, Any] = {}
    parts = {name: part for name, part in model.named_modules() if name.endswith(("_proj", "rotary_emb"))}
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, part in parts.items()
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    cos, sin = seen["model.rotary_emb"]
    made = []
    for layer in range(len(model.model.layers)):
        q, k, v = (
            seen[f"model.layers.{layer}.self_attn.{x}_proj"].unflatten(-1, (-1, 32)).transpose(1, 2) for x in "qkv"
        )
        made.append((*apply_rotary_pos_emb(q, k, cos, sin), v))
    return made


def test_q_k_and_v_are_those_of_the_projections_after_rope():
    model, inputs = LLAMA.build(), prompt(LLAMA, PADDED)
    calls = traced(model, inputs)
    assert sorted(calls) == [0, 1]
    for layer, expected in enumerate(by_projections(model, inputs)):
        for found, wanted in zip((calls[layer].q, calls[layer].k, calls[layer].v), expected, strict=True):
            assert difference(found, wanted) < 1e-6


def test_twin_keys_before_rope_would_be_seen():
    model, inputs = LLAMA.build(), prompt(LLAMA, PADDED)
    model.model.rotary_emb.register_forward_hook(
        lambda _m, _i, out: (torch.ones_like(out[0]), torch.zeros_like(out[1]))
    )
    unturned = by_projections(model, inputs)
    model.model.rotary_emb._forward_hooks.clear()
    assert difference(traced(model, inputs)[0].k, unturned[0][1]) > 0.1


def cached(model: nn.Module, inputs: dict[str, Tensor]) -> list[Any]:
    """Layers of transformers' own cache after the same prompt."""
    cache = DynamicCache(config=text_config(model.config))
    if model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache())
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return getattr(cache, "self_attention_cache", cache).layers


def same(tiny: Tiny, found: Tensor, expected: Tensor, inputs: dict[str, Tensor]) -> bool:
    """Tell whether real tokens agree: to the bit where the model's own attention is sdpa."""
    if tiny.dense == "sdpa":
        return torch.equal(found, expected)
    real = inputs["attention_mask"][:, None, -found.shape[2] :, None]
    return difference(found * real, expected * real) < 1e-5


@pytest.mark.parametrize("name", [name for name in ALL if name != LATENT])
def test_k_and_v_are_those_that_a_cache_holds(name):
    tiny = ALL[name]
    model = build(tiny)
    inputs = prompt(tiny, PADDED)
    calls, compared = traced(model, inputs), 0
    for index, layer in enumerate(cached(model, inputs)):
        if not getattr(layer, "is_initialized", False) or not isinstance(getattr(layer, "keys", None), Tensor):
            continue  # linear layers, and layers that read another one's K and V
        if layer.keys.dim() != 4:
            continue
        tokens = layer.keys.shape[2]
        window = getattr(layer, "sliding_window", None)
        assert tokens == (LONGER_THAN_THE_WINDOW if window is None else window - 1)
        assert calls[index].window == window
        assert same(tiny, calls[index].k[:, :, -tokens:], layer.keys, inputs)
        if not tiny.changes_kv:
            assert same(tiny, calls[index].v[:, :, -tokens:], layer.values, inputs)
        assert not same(
            tiny, calls[index].k[:, :, -tokens:].flip(1 if layer.keys.shape[1] > 1 else 2), layer.keys, inputs
        )
        compared += 1
    assert compared >= 1


def test_k_of_latent_attention_ends_in_what_the_cache_holds_for_all_heads():
    model, inputs = ALL[LATENT].build(), prompt(ALL[LATENT], PADDED)
    calls = traced(model, inputs)
    for index, layer in enumerate(cached(model, inputs)):
        turned = next(x for x in (layer.values, layer.keys[..., 16:]) if x.shape[-1] == 8)
        assert calls[index].k.shape[3] == 24 and calls[index].v.shape[3] == 16
        assert torch.equal(calls[index].k[..., 16:], turned.expand(-1, 4, -1, -1))
        assert not torch.equal(calls[index].k[:, 0, :, :16], calls[index].k[:, 1, :, :16])


@pytest.mark.parametrize("name", ALL)
def test_the_model_computes_what_it_always_computes(name):
    tiny = ALL[name]
    model = build(tiny)
    inputs, outputs = prompt(tiny, PADDED), []
    with torch.no_grad():
        expected = model(**inputs).logits
    hook = model.register_forward_hook(lambda _m, _i, out: outputs.append(out.logits))
    traced(model, inputs)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert outputs[0].shape[1] == 1, "of the logits only the last are made"
    exact = tiny.dense == "sdpa"  # the reference stands in for eager attention
    assert difference(outputs[0][:, 0], expected[:, -1]) < (1e-6 if exact else 1e-4)


@pytest.mark.parametrize("tiny", [T5, BART], ids=["t5", "bart"])
def test_of_an_encoder_and_a_decoder_only_the_decoders_self_attention_is_shown(tiny):
    model = build(tiny)
    inputs = prompt(tiny, {0: ENCODER_TOKENS})  # cross-attention has as many keys as queries
    seen: list[str] = []
    names = {part: name for name, part in model.named_modules()}
    plain = tracing._Run.takes

    def takes(run, module, query, key):
        taken = plain(run, module, query, key)
        seen.append(("+" if taken else "-") + names[module])
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing._Run, "takes", takes)
        calls = traced(model, inputs)
    assert len(seen) == 6, "two layers of the encoder, two of the decoder with two kinds of attention each"
    taken = [name for name in seen if name.startswith("+")]
    assert len(taken) == 2 and all("decoder" in name and "enc" not in name.lower().split(".")[-1] for name in taken)
    for index, layer in enumerate(cached(model, inputs)):
        assert torch.equal(calls[index].k, layer.keys)


def test_token_ids_alone_are_read_by_both_parts_of_an_encoder_decoder_model():
    model, ids = build(BART), words(20)
    calls = traced(model, read_prompt(model, ids).inputs)
    same = traced(model, {"input_ids": ids[None], "decoder_input_ids": ids[None]})
    assert torch.equal(calls[1].k, same[1].k)


def test_a_layer_that_attends_to_an_image_alone_is_not_shown():
    import transformers

    if not hasattr(transformers, "MllamaTextConfig"):
        pytest.skip("this transformers has no such model")
    text = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.MllamaTextConfig(
        **text, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    )
    model = transformers.MllamaForCausalLM(config).eval()
    ids = words(12)[None]
    inputs = {"input_ids": ids, "cross_attention_states": torch.randn(1, 12, 64)}
    assert traced(model, inputs).keys() == {0}
    model.config.cross_attention_layers = []
    assert 1 not in traced(model, {"input_ids": ids, "cross_attention_states": torch.randn(1, 9, 64)})


def test_layers_that_were_not_asked_for_are_not_shown():
    model = LLAMA.build()
    inputs = prompt(LLAMA, {0: 20})
    calls: list[int] = []
    seen = trace_attention(model, inputs, lambda call: calls.append(call.layer), layers=[1])
    assert calls == [1] and seen == [0, 1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss with learned sinks", "llava with an image"])
def test_hidden_is_what_enters_the_layer(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), prompt(tiny, PADDED)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
    calls = traced(model, inputs, hidden=True)
    for index, call in calls.items():
        assert difference(call.hidden, expected[index]) < 1e-4
        assert difference(call.hidden, expected[index + 1]) > 0.1
    assert all(call.hidden is None for call in traced(model, inputs).values())


def state_of(model: nn.Module) -> tuple:
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    modes = [part.training for part in model.modules()]
    weights = [(p.data_ptr(), p._version, p.grad is None) for p in model.parameters()]
    names = [p.config._attn_implementation for p in model.modules() if hasattr(p, "config")]
    return hooks, modes, weights, names


def warm_up(model: nn.Module, kind: str) -> None:
    """Run the model once: transformers' vision towers then set hooks of their own."""
    with torch.no_grad():
        model(**prompt(TINY[kind], {0: 20}))


MODES = {
    "evaluation": lambda model: model.eval(),
    "training": lambda model: model.train(),
    "one frozen layer": lambda model: decoders(model.train())[-1].get_decoder().eval(),
}
KINDS = ["llama", "llava with an image", "t5, an encoder and a decoder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(kind, mode, implementation):
    model = build(TINY[kind])
    decoders(model)[-1].set_attn_implementation(implementation)
    MODES[mode](model)
    warm_up(model, kind)
    before = state_of(model)
    traced(model, prompt(TINY[kind], PADDED), hidden=True)
    assert state_of(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was_after_an_error(kind):
    model = build(TINY[kind])
    model.train()
    warm_up(model, kind)
    before = state_of(model)

    def fail(_call: Call) -> None:
        raise RuntimeError("on purpose")

    for inputs in (prompt(TINY[kind], PADDED), {"input_ids": "nonsense"}):
        with pytest.raises((RuntimeError, ValueError, AttributeError, TypeError)):
            trace_attention(model, inputs, fail, hidden=True)
        assert state_of(model) == before
        assert tracing._running.get() is None


def test_an_encoder_with_another_attention_keeps_it():
    model = build(T5)
    model.get_encoder().set_attn_implementation("eager")
    before = state_of(model)
    traced(model, prompt(T5, PADDED))
    assert state_of(model) == before and len(set(before[3])) == 2


def test_twin_a_mode_a_hook_and_an_implementation_that_stay_would_be_seen():
    model = LLAMA.build()
    before = state_of(model)
    changes = [
        lambda: model.model.layers[0].train(),
        lambda: model.model.layers[0].register_forward_pre_hook(lambda *_: None),
        lambda: model.set_attn_implementation(tracing.NAME),
    ]
    for change in changes:
        change()
        assert state_of(model) != before
        before = state_of(model)


def test_a_model_whose_caches_are_packed_is_traced_in_full_precision():
    model = LLAMA.build()
    inputs = prompt(LLAMA, {0: 300})
    expected = traced(model, inputs)
    with occamkv.attach(model) as handle:
        found = traced(model, inputs)
        assert model.config._attn_implementation == "occamkv"
        assert handle.report() is None
    assert all(torch.equal(found[index].k, expected[index].k) for index in expected)


@pytest.mark.parametrize("name", [*OUTSIDE, "mamba2 without attention"])
def test_a_model_whose_attention_cannot_be_seen_is_refused(name):
    tiny = REFUSED[name][0] if name in REFUSED else TINY[name]
    model = tiny.build_any()
    before = state_of(model)
    with pytest.raises(UnsupportedModel, match=r"attention interface.* Allowed: models whose"):
        traced(model, prompt(tiny, {0: 20}))
    assert state_of(model) == before


BAD_PROMPTS = {
    "no token": (torch.zeros(1, 0, dtype=torch.int64), r"\[1, 0\], has an empty sequence"),
    "a row of pads": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 0]])},
        r"\[2, 3\], has an empty sequence",
    ),
    "numbers that are no ids": (torch.ones(1, 4), "has no token ids"),
    "no ids": ({"pixel_values": torch.ones(1)}, r"no token ids \(it has: pixel_values\)"),
    "a mask of another shape": (
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 3, 3)},
        r"attention_mask has shape \[1, 1, 3, 3\]; allowed: \[1, 3\]",
    ),
    "a cache": ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "past_key_values": DynamicCache()}, "past_key_val"),
}


@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_a_prompt_that_cannot_be_read_is_refused(what):
    given, told = BAD_PROMPTS[what]
    with pytest.raises(UnsupportedInput, match=told):
        read_prompt(LLAMA.build(), given)


def test_an_encoder_decoder_model_needs_the_ids_of_its_decoder():
    with pytest.raises(UnsupportedInput, match="a mapping with decoder_input_ids"):
        read_prompt(BART.build(), {"input_ids": words(5)[None]})


LLAVA = TINY["llava with an image"]
IMAGE = ["text"] * 5 + ["image"] * 4 + ["text"] * 3


def test_the_modality_of_a_token_comes_from_the_ids_that_the_configuration_names():
    model = LLAVA.build()
    inputs = prompt(LLAVA, {0: 12})
    assert list(read_prompt(model, inputs).modality) == IMAGE
    model.config.image_token_id = None
    assert set(read_prompt(model, inputs).modality) == {"text"}


def test_what_the_processor_says_of_a_token_comes_first():
    inputs = prompt(LLAVA, {0: 12})
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[0, 2], kinds[0, 3], kinds[0, 4] = 2, 3, 7
    found = read_prompt(LLAVA.build(), {**inputs, "mm_token_type_ids": kinds}).modality
    assert found[:6] == ("text", "text", "video", "audio", "kind 7", "text")


def test_token_types_count_for_multi_modal_models_alone():
    model, inputs = LLAVA.build(), prompt(LLAVA, {0: 12})
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    model.config.image_token_id = None
    assert list(read_prompt(model, {**inputs, "token_type_ids": types}).modality) == IMAGE
    inputs = {"input_ids": inputs["input_ids"], "token_type_ids": types}
    assert set(read_prompt(LLAMA.build(), inputs).modality) == {"text"}


def test_a_window_in_no_layer_is_none():
    fields = {**TINY["gemma3"].fields, "layer_types": ["full_attention", "full_attention"]}
    tiny = dataclasses.replace(TINY["gemma3"], fields=fields)
    assert {call.window for call in traced(tiny.build(), prompt(tiny, PADDED)).values()} == {None}
