"""What is asked of a model for the balanced rotation: the right numbers, asked once, and the model stays as it was."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

import occamkv
from integrations.architectures import TINY
from integrations.steps import difference, prompt, run, words
from occamkv import PackedCache
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers.model import decoders
from occamkv.integrations.transformers.probing import random_ids
from occamkv.integrations.transformers.statistics import model_statistics
from occamkv.methods.crossing import Statistics

LLAMA = TINY["llama"]
HEADS, QUERY_HEADS, D, FIRST = 2, 4, 32, 4
ABOVE_ALL = 10**6
ROUNDING = 1e-5
SILENT = [
    "falcon outside the attention interface",
    "bloom outside the attention interface",
    "diffllama, which repeats V",
]


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


def some_d(layers: int = 2, *, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.exp(0.7 * torch.randn(HEADS, D, generator=generator)) for layer in range(layers)}


def projections(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What q_proj and k_proj of each layer put out, `[T, heads, D]` float64, after RoPE written out by hand."""
    seen: dict[str, Tensor] = {}
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out[0].double()}))
        for name, part in model.named_modules()
        if name.endswith(("q_proj", "k_proj"))
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    angle = torch.arange(ids.shape[1])[:, None].double() * 10000.0 ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]

    def turned(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, D)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    layers = [name.removesuffix("q_proj") for name in seen if name.endswith("q_proj")]
    return [(turned(seen[layer + "q_proj"]), turned(seen[layer + "k_proj"])) for layer in layers]


def by_hand(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The balance vector `[H, D]` and E[q q^T] `[H, D, D]` of one layer, head by head and channel by channel."""
    q, k, group = q[FIRST:], k[FIRST:], QUERY_HEADS // HEADS
    d, moments = torch.zeros(HEADS, D).double(), torch.zeros(HEADS, D, D).double()
    for head in range(HEADS):
        reading = q[:, head * group : (head + 1) * group].reshape(-1, D)
        moments[head] = sum(torch.outer(row, row) for row in reading) / len(reading)
        for c in range(D):
            pair = (c, (c + D // 2) % D)  # RoPE turns these two into each other
            energy = sum(float(moments[head, p, p]) for p in pair)
            groups = [k[at : at + 32, head, p] for at in range(0, len(k), 32) for p in pair]
            variance = sum(float(((x - x.mean()) ** 2).sum() / 31) for x in groups)
            d[head, c] = (energy / variance) ** 0.25
        d[head] /= float(d[head].log().mean().exp())
    return d, moments


def test_d_and_the_moment_are_those_of_the_projections_after_rope(model):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= torch.exp(torch.randn(QUERY_HEADS * D, 1))
    ids = words(FIRST + 128)[None]
    found = model_statistics(model, ids)
    assert sorted(found) == [0, 1]
    for layer, (q, k) in enumerate(projections(model, ids)):
        d, moment = by_hand(q, k)
        assert difference(found[layer].balance, d) < 1e-4
        assert difference(found[layer].moment, moment) < 1e-4
        assert float(d.max() / d.min()) > 1.5, "a balance that does something"


@pytest.mark.parametrize("heads", [1, 4], ids=["one KV head", "a KV head for each query head"])
def test_shapes_follow_the_kv_heads(heads):
    model = dataclasses.replace(LLAMA, fields={"num_key_value_heads": heads}).build()
    for layer in model_statistics(model).values():
        assert layer.balance.shape == (heads, D) and layer.moment.shape == (heads, D, D)
        assert layer.balance.isfinite().all() and (layer.balance > 0).all()
        torch.testing.assert_close(layer.balance.log().mean(-1), torch.zeros(heads), atol=1e-5, rtol=0)


def same(first: dict[int, Statistics], second: dict[int, Statistics]) -> bool:
    pairs = [(first[i], second[i]) for i in first]
    return first.keys() == second.keys() and all(
        torch.equal(a.balance, b.balance) and torch.equal(a.moment, b.moment) for a, b in pairs
    )


def test_the_same_model_always_gives_the_same(model):
    assert same(model_statistics(model), model_statistics(LLAMA.build()))
    torch.manual_seed(99)
    assert same(model_statistics(copy.deepcopy(model)), model_statistics(model))
    assert torch.equal(random_ids(model), random_ids(model))
    assert random_ids(model).shape == (1, FIRST + 128) and int(random_ids(model).max()) < 99


def counted(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_model_is_asked_once_however_many_caches_it_gets(model):
    calls = counted(model)
    for method in ("occam", "occam_quality", "occam_small"):
        PackedCache(model, method)
    with occamkv.attach(model):
        pass
    assert len(calls) == 1
    PackedCache(model, "oscar")
    assert len(calls) == 1


def test_a_model_that_was_made_in_inference_mode_can_be_asked(model):
    with torch.inference_mode():
        made = LLAMA.build()
    assert same(model_statistics(made), model_statistics(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {entry.method.k_rotation for entry in PackedCache(made).plan.layers} == {"balanced"}


CHANGES = {
    "an optimizer's step": lambda model: model.model.layers[0].self_attn.q_proj.weight.mul_(
        torch.linspace(0.1, 3, 128)[:, None]
    ),
    "another state": lambda model: model.load_state_dict(
        {name: 2 * w if name.endswith("0.self_attn.o_proj.weight") else w * 1 for name, w in model.state_dict().items()}
    ),
    "another tensor": lambda model: setattr(
        model.model.layers[0].self_attn.k_proj, "weight", nn.Parameter(torch.randn(64, 64))
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_whose_weights_changed_is_asked_again(what, model):
    calls, before = counted(model), model_statistics(model)
    with torch.no_grad():
        CHANGES[what](model)
    after = model_statistics(model)
    assert len(calls) == 2
    assert not same(before, after)
    assert same(after, model_statistics(model, random_ids(model)))


def state_of(model: nn.Module) -> tuple:
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    modes = [part.training for part in model.modules()]
    weights = [(p.data_ptr(), p._version, p.grad is None, p.requires_grad) for p in model.parameters()]
    return hooks, modes, weights, model.config._attn_implementation, torch.get_rng_state().tolist()


MODES = {
    "evaluation": lambda model: model.eval(),
    "training": lambda model: model.train(),
    "training, one layer frozen": lambda model: model.train().model.layers[0].eval(),
    "evaluation, one layer training": lambda model: model.eval().model.layers[1].train(),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_left_as_it_was(mode, implementation, model):
    model.set_attn_implementation(implementation)
    MODES[mode](model)
    before = state_of(model)
    model_statistics(model)
    assert state_of(model) == before


def test_the_model_is_left_as_it_was_after_an_error_and_keys_are_then_not_rotated(model):
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    before = state_of(model)
    with pytest.warns(UserWarning, match="queries could not be read .*NaN.*keys are not rotated and not balanced"):
        cache = PackedCache(model, "occam_quality")
    rotations = {(e.method.k_rotation, e.method.feedback, e.method.v_rotation) for e in cache.plan.layers}
    assert rotations == {("none", False, "hadamard")}
    assert state_of(model)[:3] == before[:3]


def test_twin_a_trace_would_be_seen(model):
    before = state_of(model)
    model.model.layers[0].train()
    assert state_of(model) != before


@pytest.mark.parametrize("name", [name for name in TINY if name not in SILENT])
def test_every_architecture_with_our_attention_is_asked_without_a_warning(name):
    model = TINY[name].build()
    if not all(part._can_set_attn_implementation() for part in decoders(model)):
        pytest.skip(f"{type(model).__name__} of this transformers has attention outside the interface")
    before = model.config.get_text_config(decoder=True)._attn_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model_statistics(model)
        cache = PackedCache(model)
    assert model.config.get_text_config(decoder=True)._attn_implementation == "occamkv" != before
    assert sorted(found) == TINY[name].packed
    inputs = {k: v for k, v in prompt(TINY[name], {0: 40}).items() if k != "attention_mask"}
    with occamkv.attach(model) as handle, torch.no_grad():
        held = model(**inputs).past_key_values
    assert not handle.report().quantized
    for index in TINY[name].packed:
        k = getattr(held, "self_attention_cache", held).layers[index].keys
        assert found[index].balance.shape == (k.shape[1], k.shape[3])
        assert not torch.allclose(found[index].balance, torch.ones(()), atol=0.01)
        assert cache.plan.layers[index].method.k_rotation == "balanced"


@pytest.mark.parametrize("name", SILENT)
def test_a_model_that_cannot_be_asked_keeps_its_keys_unrotated_and_says_so(name):
    model, tokens = TINY[name].build(), words(12, seed=3)[None]
    given = (model, prompt(TINY[name], {0: 200}), tokens)
    with pytest.warns(UserWarning, match="queries could not be read"):
        cache = PackedCache(model)
    assert {entry.method.k_rotation for entry in cache.plan.layers} == {"none"}
    logits = run(*given, past_key_values=cache).logits
    plain = PackedCache(model, occamkv.method("occam", k_rotation="none"))
    assert torch.equal(logits, run(*given, past_key_values=plain).logits)
    assert cache.report().quantized
    assert {layer.method for layer in cache.report().packed_layers} == {"occam+"}
    with pytest.warns(UserWarning, match="queries could not be read"), occamkv.attach(model) as handle:
        assert torch.equal(logits, run(*given).logits)
    assert handle.report().quantized


def step_logits(model: nn.Module, cache: PackedCache, tokens: int = 300) -> Tensor:
    """Logits while decoding behind a prompt, where unpacked tokens are read in cache space."""
    return run(model, prompt(LLAMA, {0: tokens}), words(12, seed=3)[None], past_key_values=cache).logits


def test_any_d_leaves_the_logits_as_they_are_while_nothing_is_packed(model):
    untouched = run(model, prompt(LLAMA, {0: 300}), words(12, seed=3)[None]).logits
    for seed in range(3):
        cache = PackedCache(model, balance=some_d(seed=seed), min_tokens=ABOVE_ALL)
        assert difference(step_logits(model, cache), untouched) < ROUNDING
        assert not cache.report().quantized
    packed = [step_logits(model, PackedCache(model, balance=some_d(seed=seed))) for seed in (0, 1)]
    assert difference(packed[0], packed[1]) > 100 * ROUNDING


@pytest.mark.parametrize("method", ["occam", "occam_quality"])
def test_vectors_given_by_the_caller_replace_those_of_the_model(method, model):
    given, own = some_d(1), model_statistics(model)
    cache = PackedCache(model, method, balance=given)
    step_logits(model, cache)
    first, second = (layer.cache.statistics for layer in cache.layers)
    assert torch.equal(first.balance, given[0])
    assert torch.equal(second.balance, own[1].balance)
    if method == "occam_quality":
        assert torch.equal(first.moment, own[0].moment)
    assert cache.report().quantized


def test_with_all_vectors_given_the_model_is_not_asked(model):
    calls = counted(model)
    PackedCache(model, balance=some_d())
    assert not calls


def test_a_configuration_with_the_models_vectors_is_as_good_as_the_model(model):
    expected = step_logits(model, PackedCache(model))
    vectors = {layer: found.balance for layer, found in model_statistics(model).items()}
    assert torch.equal(step_logits(model, PackedCache(model.config, balance=vectors)), expected)


BAD_VECTORS = {
    "of another shape": torch.ones(2, 16),
    "with a zero": torch.cat((torch.zeros(2, 1), torch.ones(2, 31)), dim=1),
    "with infinity": torch.full((2, 32), float("inf")),
}


@pytest.mark.parametrize("what", BAD_VECTORS)
def test_a_vector_that_cannot_be_a_balance_is_refused(what, model):
    cache = PackedCache(model, balance={0: BAD_VECTORS[what], 1: torch.ones(2, 32)})
    with pytest.raises(UnsupportedInput, match=r"balance has shape .* \[H, D\] = \(2, 32\)"), torch.no_grad():
        model(words(40)[None], past_key_values=cache)
    assert cache.get_seq_length() == 0
