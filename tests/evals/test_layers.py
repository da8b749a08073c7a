"""Errors of attention layers, against hooks and float64 sums of our own; and which modules are attention layers."""

import functools

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import saved_models
from occamkv import PackedCache
from occamkv.evals.fidelity import read_together, step_ends
from occamkv.evals.layers import LayerWatch
from occamkv.integrations.transformers import plan_for
from occamkv.integrations.transformers.model import attention_modules

TOKENS = 300
SIZES = {key: value for key, value in saved_models.SIZES.items() if key != "head_dim"}
ARCHITECTURES = {
    "separate projections": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "fused projection": ("Phi3Config", "Phi3ForCausalLM", SIZES),
    "convolution": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 99}),
    "sliding and full": ("Gemma3TextConfig", "Gemma3ForCausalLM", saved_models.KINDS["half sliding"][2]),
}


@functools.cache
def model(kind: str):
    return saved_models.build(kind)


def ids() -> Tensor:
    return torch.randint(4, 96, (1, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(kind: str, cache: DynamicCache, ends: list[int]) -> list[Tensor]:
    """Return what each layer's `self_attn` gives for the whole text, read in these steps: float64 `[T, width]`."""
    found: dict[int, list[Tensor]] = {}
    layers = model(kind).model.layers
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _a, out, i=i: found.setdefault(i, []).append(out[0][0]))
        for i, layer in enumerate(layers)
    ]
    start = 0
    for end in ends:
        model(kind)(ids()[:, start:end], past_key_values=cache)
        start = end
    for hook in hooks:
        hook.remove()
    return [torch.cat(found[i]).double() for i in range(len(layers))]


@functools.cache
def truth(kind: str, name: str, score_from: int) -> dict[int, float]:
    plan = plan_for(model(kind).config, name)
    ends = step_ends(plan, start=0, end=TOKENS)
    packed = outputs(kind, PackedCache(model(kind), plan=plan), ends)
    full = outputs(kind, DynamicCache(config=model(kind).config), ends)
    errors = {}
    for index, (a, b) in enumerate(zip(packed, full, strict=True)):
        if plan.layers[index].packs:
            errors[index] = float((a - b)[score_from:].norm() / b[score_from:].norm())
    return errors


def watched(kind: str, *names: str, score_from: int = 150) -> dict[str, dict[int, float]]:
    plans = {name: plan_for(model(kind).config, name) for name in names}
    read = read_together(model(kind), ids(), plans, score_from=score_from, watch_layers=True)
    return {name: reading.layer_errors for name, reading in read.items()}


@pytest.mark.parametrize("score_from", [0, 128, 150, TOKENS - 2])
@pytest.mark.parametrize("name", ["oscar", "occam", "ott"])
def test_errors_are_norms_of_differences_over_the_scored_positions(name, score_from):
    errors = watched("packable", name, score_from=score_from)[name]
    assert errors == pytest.approx(truth("packable", name, score_from), rel=1e-3)
    assert len(errors) == 2
    assert all(0.01 < error < 2 for error in errors.values())


def test_other_positions_or_another_method_have_other_errors():
    right = truth("packable", "oscar", 150)
    for other in (truth("packable", "oscar", 128), truth("packable", "oscar", 160), truth("packable", "occam", 150)):
        assert right != pytest.approx(other, rel=1e-3)


def test_methods_that_are_watched_together_have_the_errors_they_have_alone():
    together = watched("packable", "oscar", "turboquant", "full")
    assert together["full"] == {}
    for name in ("oscar", "turboquant"):
        assert together[name] == watched("packable", name)[name]


def test_only_packed_layers_have_errors():
    assert watched("half sliding", "oscar")["oscar"] == pytest.approx(truth("half sliding", "oscar", 150), rel=1e-3)
    assert set(truth("half sliding", "oscar", 150)) == {1}


def test_without_being_asked_nothing_is_watched():
    plans = {"oscar": plan_for(model("packable").config, "oscar")}
    assert read_together(model("packable"), ids(), plans, score_from=150)["oscar"].layer_errors == {}


def hooks_of(kind: str) -> int:
    return sum(len(module._forward_hooks) for module in model(kind).modules())


def test_no_hook_stays_behind_also_after_an_error():
    watched("packable", "oscar")
    assert hooks_of("packable") == 0
    with pytest.raises(RuntimeError, match="stop"), LayerWatch(model("packable")) as watch:
        assert hooks_of("packable") == 2
        watch.begin(None, 1)
        raise RuntimeError("stop")
    assert hooks_of("packable") == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_modules_are_those_that_make_v(name):
    config, model_class, fields = ARCHITECTURES[name]
    built = getattr(transformers, model_class)(getattr(transformers, config)(**fields))
    found = list(attention_modules(built))
    assert [index for index, _ in found] == [0, 1]
    assert all("Attention" in type(module).__name__ for _, module in found)
