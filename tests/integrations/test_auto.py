"""auto in a model: whatever way the tokens come, the layers choose, stay within the budget, and say what they chose."""

import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn

import occamkv
from integrations.architectures import TINY
from integrations.steps import prompt, run, words
from occamkv import PackedCache, Plan
from occamkv.errors import UnsupportedFormat
from occamkv.integrations.transformers.layer import PackedLayer

LLAMA = dataclasses.replace(TINY["llama"], fields={"num_hidden_layers": 4}, layers=4)
CHEAPEST = 2.51  # bits of the cheapest candidate with 2 KV heads of 32 channels, rounded up
NEW = words(6, seed=3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return LLAMA.build()


def read(model: nn.Module, cache, ends, *, rows: int = 1) -> None:
    """Read words in steps that end where `ends` says."""
    ids, start = torch.stack([words(max(ends), row=row) for row in range(rows)]), 0
    for end in ends:
        with torch.no_grad():
            model(ids[:, start:end], past_key_values=cache)
        start = end


def chosen(cache) -> list[occamkv.Method]:
    return [entry.method for entry in cache.plan.layers if entry.packs]


def assert_within(cache, budget: float) -> None:
    """Raise unless every layer has chosen and packs, and the mean bits are within the budget."""
    layers = cache.report().packed_layers
    assert all(layer.packed_tokens for layer in layers)
    assert all(one.budget is None and one.name == "occam_quality" for one in chosen(cache))
    assert [layer.method for layer in layers] == [str(one) for one in chosen(cache)]
    assert sum(layer.bits_per_value for layer in layers) / len(layers) <= budget + 1e-6


WAYS = {
    "one call": [300],
    "chunks": [4, 70, 132, 196, 300],
    "token by token": list(range(1, 141)),
    "one call, then tokens": [130, 131, 132, 133, 134],
}


@pytest.mark.parametrize("budget", [CHEAPEST, 3.0, 3.6, 4.6])
@pytest.mark.parametrize("way", WAYS)
def test_every_layer_chooses_within_the_budget(way, budget, model):
    cache = PackedCache(model, occamkv.method("auto", budget=budget))
    read(model, cache, WAYS[way])
    assert_within(cache, budget)
    if budget == CHEAPEST:
        assert {(one.format.k_bits, one.format.v_bits) for one in chosen(cache)} == {(2, 2)}
    if budget == 4.6:
        assert {(one.format.k_bits, one.format.v_bits) for one in chosen(cache)} == {(4, 4)}


def test_nothing_is_chosen_before_the_first_tokens_are_due(model):
    cache = PackedCache(model, "auto_b2.7", min_tokens=200)
    read(model, cache, [199])
    assert {one.budget for one in chosen(cache)} == {2.7}
    read(model, cache, [1])
    assert_within(cache, 2.7)


GENERATE = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "sampling of two sequences": {"do_sample": True, "num_return_sequences": 2},
    "a prompt in chunks": {"prefill_chunk_size": 64},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
}


@pytest.mark.parametrize("feature", GENERATE)
def test_generate_works(feature, model):
    rows = {0: 180} if feature == "prompt lookup" else {0: 180, 1: 150}
    torch.manual_seed(0)
    if feature == "a prompt in chunks":  # older versions want a cache for it
        cache = PackedCache(model, "auto")
        model.generate(**prompt(LLAMA, rows), max_new_tokens=6, past_key_values=cache, **GENERATE[feature])
        assert_within(cache, 3.0)
        return
    with occamkv.attach(model, "auto") as handle:
        model.generate(**prompt(LLAMA, rows), max_new_tokens=6, **GENERATE[feature])
        assert_within(handle, 3.0)
    assert_within(handle, 3.0)


@pytest.mark.parametrize("rows", [{0: 300}, {0: 180, 1: 300}], ids=["one sequence", "a left-padded batch"])
def test_a_saved_plan_repeats_the_choice_and_the_bytes(rows, model, tmp_path):
    given, tokens = prompt(LLAMA, rows), NEW.expand(len(rows), -1)
    runs = [run(model, given, tokens, past_key_values=PackedCache(model, "auto"))]
    runs[0].cache.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == runs[0].cache.plan
    runs.append(run(model, given, tokens, past_key_values=PackedCache(model, plan=tmp_path / "plan.json")))
    runs.append(run(model, given, tokens, past_key_values=PackedCache(model, "auto")))
    for again in runs[1:]:
        assert again.cache.plan == runs[0].cache.plan
        assert torch.equal(again.logits, runs[0].logits)
        for one, other in zip(again.cache.layers, runs[0].cache.layers, strict=True):
            for a, b in zip(one.cache.store.pool.slabs, other.cache.store.pool.slabs, strict=True):
                assert torch.equal(a.records, b.records)


def test_a_batch_chooses_as_its_longest_sequence_does_alone(model):
    caches = [PackedCache(model, "auto") for _ in range(2)]
    for cache, rows in zip(caches, ({1: 300}, {0: 180, 1: 300}), strict=True):
        run(model, prompt(LLAMA, rows), NEW.expand(len(rows), -1), past_key_values=cache)
    assert caches[0].plan == caches[1].plan


def test_a_copy_chooses_as_the_original(model):
    cache = PackedCache(model, "auto")
    read(model, cache, [100])
    other = copy.deepcopy(cache)
    for one in (cache, other):
        read(model, one, [60, 61])
        assert_within(one, 3.0)
    assert cache.plan == other.plan


def test_a_choice_outlives_reset(model):
    cache = PackedCache(model, "auto")
    read(model, cache, [200])
    before = cache.plan
    cache.reset()
    read(model, cache, [150])
    assert cache.plan == before
    assert_within(cache, 3.0)


def test_choices_are_logged_layer_by_layer(model, caplog):
    cache = PackedCache(model, "auto")
    with caplog.at_level(logging.INFO, logger="occamkv.auto"):
        read(model, cache, [700])
    lines = [record.getMessage() for record in caplog.records if record.name == "occamkv.auto"]
    assert len(lines) == 5
    for index, one in enumerate(chosen(cache)):
        assert lines[index].startswith(f"layer {index}: {one} with K rotation {one.k_rotation}")
        assert "32 queries on 196 tokens" in lines[index]  # 4 pins and three groups of 64
    assert lines[-1].startswith("4 layers: 2.")
    assert "budget 3.00" in lines[-1]


def test_a_layer_that_needs_bits_of_k_gets_them():
    model = LLAMA.build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 0.02  # attention is nearly even: K hardly matters
        model.model.layers[2].self_attn.q_proj.weight *= 100  # here it looks at single tokens
    cache = PackedCache(model, "auto")
    read(model, cache, [300])
    bits = [one.format.k_bits for one in chosen(cache)]
    assert bits[2] > max(bits[:2] + bits[3:])


ARCHITECTURES = [
    "qwen2 with a large key bias",
    "phi3 with head_dim 24",
    "gemma2 with a soft cap",
    "gemma3n with shared KV",
    "diffllama, which repeats V",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_choose_too(name, recwarn):
    tiny = TINY[name]
    model = tiny.build()
    cache = PackedCache(model, "auto_b3.5")
    run(model, prompt(tiny, {0: 300}), NEW[None], past_key_values=cache)
    assert_within(cache, 3.5)


def test_without_queries_layers_are_taken_to_be_typical(caplog):
    tiny = TINY["diffllama, which repeats V"]
    model = tiny.build()
    cache = PackedCache(model, "auto_b3.5")
    if not isinstance(cache.layers[0], PackedLayer) or cache.layers[0].cache.chooser is None:
        pytest.fail("the layer has no chooser")
    with caplog.at_level(logging.INFO, logger="occamkv.auto"):
        run(model, prompt(tiny, {0: 300}), NEW[None], past_key_values=cache)
    assert any("no queries were seen" in record.getMessage() for record in caplog.records)


def test_a_budget_that_small_heads_cannot_meet_is_refused_and_the_cache_can_be_reset(model):
    cache = PackedCache(model, "auto_b2.3")
    with pytest.raises(UnsupportedFormat, match=r"budget is 2.3 bits per value, but this layer takes 2.51 at least"):
        read(model, cache, [300])
    assert cache.get_seq_length() == 0
