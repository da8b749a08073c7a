"""A plan does the same from its file as in memory; one that does not fit is refused before anything runs."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import occamkv
from integrations.architectures import TINY
from integrations.steps import prompt, run, words
from integrations.tiny import Tiny
from occamkv import PackedCache, Plan
from occamkv.cache import LayerPlan
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.integrations.transformers import plan_for

LLAMA = TINY["llama"]
OTHERS = {
    "a model with more layers": {"num_hidden_layers": 3},
    "a model of the same shape with another RoPE": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


def test_a_plan_read_back_from_its_file_does_the_same(model, tmp_path):
    made = plan_for(model.config, occamkv.method("kivi", k_bits=4, pins="first:4"))
    kept = LayerPlan(0, occamkv.method("full"), "kept for a test")
    plan = Plan((kept, made.layers[1]), made.model_type, made.fingerprint)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    tokens, runs = words(8, seed=3)[None], []
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        with occamkv.attach(model, plan=given) as handle:
            runs.append((run(model, prompt(LLAMA, {0: 300}), tokens).logits, handle.report()))
        assert torch.equal(runs[-1][0], runs[0][0])
        assert runs[-1][1] == runs[0][1]
    whole, packed = runs[0][1].layers
    assert (whole.method, whole.reason, whole.packed_bytes) == ("full", "kept for a test", 0)
    assert (packed.method, packed.packed_tokens) == ("kivi_k4v2+", 256)
    assert packed.pin_bytes > 0


def plan_of(tiny: Tiny) -> Plan:
    return plan_for(tiny.build().config, "oscar")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("give_plan", [occamkv.attach, PackedCache], ids=["attach", "PackedCache"])
def test_a_plan_of_another_model_is_refused(give_plan, name, model):
    before = model.config._attn_implementation
    with pytest.raises(CacheMismatch, match="Make a plan for this model"):
        give_plan(model, plan=plan_of(dataclasses.replace(LLAMA, fields=OTHERS[name])))
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks


def test_a_plan_that_packs_a_sliding_layer_is_refused():
    model, plan = TINY["gemma3"].build(), plan_of(TINY["gemma3"])
    both = dataclasses.replace(plan, layers=(LayerPlan(0, occamkv.method("oscar")), plan.layers[1]))
    for give_plan in (occamkv.attach, PackedCache):
        with pytest.raises(UnsupportedInput, match=r"layer 0.*sliding window"):
            give_plan(model, plan=both)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


BAD_FILES = {
    "no JSON": "layers: 2",
    "another version": json.dumps({"schema_version": 99}),
    "no layers": json.dumps({"schema_version": 1}),
    "no object": "[]",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_plan_is_refused(name, model, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(BAD_FILES[name])
    with pytest.raises(UnsupportedInput, match="plan"):
        occamkv.attach(model, plan=path)
    with pytest.raises(UnsupportedInput, match="cannot read the plan"):
        PackedCache(model, plan=tmp_path / "missing.json")
    assert not model._forward_pre_hooks
