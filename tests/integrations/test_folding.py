"""`fold`: V's rotation in the weights changes no logit, is noted in the configuration, or is refused."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from integrations.architectures import TINY
from integrations.steps import difference, prompt, run, words
from integrations.tiny import Tiny
from occamkv import PackedCache, fold
from occamkv.cache.folding import fold_value
from occamkv.errors import UnsupportedModel
from occamkv.integrations.transformers import folding

LLAMA = TINY["llama"]
FOLDABLE = {
    "llama": LLAMA,
    "llama with a KV head for each query head": dataclasses.replace(LLAMA, fields={"num_key_value_heads": 4}),
    "llama with one KV head": dataclasses.replace(LLAMA, fields={"num_key_value_heads": 1}),
    "llama with head_dim 24": dataclasses.replace(LLAMA, fields={"head_dim": 24}),
    "qwen2 with biases": TINY["qwen2"],
    "gemma3 with a sliding layer": TINY["gemma3"],
}
IDS = words(300)[None]
EXACT, ROUNDING_OF_CODES = 1e-5, 1e-4

every_foldable = pytest.mark.parametrize("name", FOLDABLE)


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def same_weights(model: nn.Module, saved: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


def packed_logits(model: nn.Module, method: str = "occam") -> Tensor:
    tokens = words(12, seed=3)[None]
    return run(model, prompt(LLAMA, {0: 300}), tokens, past_key_values=PackedCache(model, method)).logits


@every_foldable
def test_logits_are_the_same_before_and_after(name):
    model = FOLDABLE[name].build()
    before, saved = logits(model), weights(model)
    report = fold(model)
    assert list(report.folded) == FOLDABLE[name].packed
    assert not report.refused
    assert difference(logits(model), before) < EXACT
    assert not same_weights(model, saved)


@pytest.mark.parametrize(
    ("method", "k_rotation", "rounding_of_codes"),
    [("oscar", "hadamard", ROUNDING_OF_CODES), ("occam", "balanced", 1e-2)],  # a code that flips moves its group's grid
)
@every_foldable
def test_a_cache_made_afterwards_leaves_v_alone_and_reads_the_same(name, method, k_rotation, rounding_of_codes):
    model = FOLDABLE[name].build()
    rotating, before = PackedCache(model, method), packed_logits(model, method)
    full = logits(model)
    fold(model)
    plain = PackedCache(model, method)
    for index in FOLDABLE[name].packed:
        assert rotating.plan.layers[index].method.v_rotation == "hadamard"
        assert plain.plan.layers[index].method.v_rotation == "none"
        assert plain.plan.layers[index].method.k_rotation == k_rotation
    assert difference(packed_logits(model, method), before) < rounding_of_codes
    assert difference(before[:, 1:], full[:, -1:]) > 10 * rounding_of_codes


def test_the_fold_is_saved_and_loaded_with_the_model(model, tmp_path):
    before, packed = logits(model), packed_logits(model)
    fold(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert difference(logits(loaded), before) < EXACT
    assert {layer.method.v_rotation for layer in PackedCache(loaded).plan.layers} == {"none"}
    loaded.generation_config.pad_token_id = 0
    assert difference(packed_logits(loaded), packed) < ROUNDING_OF_CODES
    with pytest.raises(UnsupportedModel, match="already folded"):
        fold(loaded)


def test_a_model_is_folded_only_once(model):
    fold(model)
    saved, before = weights(model), logits(model)
    with pytest.raises(UnsupportedModel, match=r"already folded into layers \[0, 1\]"):
        fold(model)
    assert same_weights(model, saved)
    assert torch.equal(logits(model), before)


REFUSED = {
    "phi3 with head_dim 24": "fused projection (qkv_proj)",
    "qwen3_next with linear layers": "between V and the output projection",
    "t5, an encoder and a decoder": "",
    "falcon outside the attention interface": "",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_folded_is_refused_and_not_one_bit_of_it_changes(name):
    model = TINY[name].build()
    saved, inputs = weights(model), prompt(TINY[name], {0: 40})
    before = logits(model, **inputs)
    with pytest.raises(UnsupportedModel) as refusal:
        fold(model)
    assert REFUSED[name] in str(refusal.value)
    assert "Nothing was changed" in str(refusal.value)
    assert same_weights(model, saved)
    assert torch.equal(logits(model, **inputs), before)


@pytest.mark.parametrize("name", [name for name in TINY if name not in REFUSED])
def test_every_other_architecture_keeps_its_logits_whether_it_is_folded_or_refused(name):
    tiny: Tiny = TINY[name]
    model = tiny.build()
    inputs, saved = prompt(tiny, {0: 40}), weights(model)
    before = logits(model, **inputs)
    try:
        fold(model)
    except UnsupportedModel:
        assert same_weights(model, saved)
    assert difference(logits(model, **inputs), before) < EXACT


def test_twin_a_fold_of_v_alone_moves_the_logits(model):
    before = logits(model)
    value = model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        value.weight.copy_(fold_value(value.weight, None, heads=2)[0])
    assert difference(logits(model), before) > 100 * EXACT


def test_twin_a_wrong_fold_is_seen_by_the_check_and_undone(model, monkeypatch):
    saved = weights(model)
    monkeypatch.setattr(folding, "fold_output", lambda weight, *, heads: weight)
    with pytest.raises(UnsupportedModel, match="between V and the output projection"):
        fold(model)
    assert same_weights(model, saved)
    monkeypatch.undo()
    assert fold(model).folded == (0, 1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_the_check_leaves_no_hook_and_the_mode_as_it_was(training, model):
    model.train(training)
    fold(model)
    assert all(part.training == training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
