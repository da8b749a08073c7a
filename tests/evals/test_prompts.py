"""A prompt read once gives every cache the state, bit for bit, that a whole-prompt call of its own leaves in it."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from cache_mirror import assert_same, leaves
from integrations.architectures import TINY
from occamkv import PackedCache, method
from occamkv.errors import UnsupportedInput
from occamkv.evals.prompts import Prompt, continue_with, greedy
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.plan import plan_for

PROMPTS = {"shorter than a page": 40, "two pages and a rest": 300}
METHODS = {"oscar": method("oscar"), "rolling with pins": method("kivi_roll", pins="first:4")}
THROUGH_INTERFACE = ["llama", "gemma2 with a soft cap", "gemma3", "gemma4 with shared KV", "lfm2 with convolutions"]
OUTSIDE = ["falcon outside the attention interface", "diffllama, which repeats V"]


def words(tokens: int, *, seed: int = 1) -> Tensor:
    return torch.randint(3, 99, (1, tokens), generator=torch.Generator().manual_seed(seed))


class Pair(NamedTuple):
    """A model, a prompt read once, a cache made of it, and one that the model itself filled."""

    model: torch.nn.Module
    prompt: Prompt
    made: PackedCache
    called: PackedCache


@torch.no_grad()
def pair(name: str, tokens: int, chosen=METHODS["oscar"]) -> Pair:
    model = TINY[name].build(TINY[name].exact)
    plan = plan_for(model.config, chosen)
    prompt = Prompt.read(model, words(tokens))
    called = PackedCache(model, plan=plan)
    model(words(tokens), past_key_values=called, use_cache=True)
    return Pair(model, prompt, prompt.cache(plan), called)


def state(layer) -> dict:
    """What a layer holds; the links to its neighbours aside."""
    return leaves(layer.cache) if isinstance(layer, PackedLayer) else leaves(layer)


def assert_same_layers(a: PackedCache, b: PackedCache) -> None:
    for one, other in zip(a.layers, b.layers, strict=True):
        assert_same(state(one), state(other))


@pytest.mark.parametrize("tokens", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("chosen", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", THROUGH_INTERFACE)
def test_the_cache_is_that_of_a_real_call_and_so_is_all_that_follows(name, chosen, tokens):
    model, prompt, made, called = pair(name, tokens, chosen)
    assert_same_layers(made, called)
    assert made.report() == called.report()
    more = words(150, seed=2)
    logits = [continue_with(model, cache, more, prompt.logits) for cache in (made, called)]
    assert torch.equal(*logits)
    assert_same_layers(made, called)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_model_outside_the_attention_interface_continues_as_after_a_real_call(name):
    model, prompt, made, called = pair(name, 300)
    logits = [continue_with(model, cache, words(150, seed=2), prompt.logits) for cache in (made, called)]
    assert torch.equal(*logits)


def test_another_prompt_gives_another_cache():
    model, _, made, _ = pair("llama", 300)
    other = Prompt.read(model, words(300, seed=7)).cache(made.plan)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_layers(made, other)


def test_the_prompts_logits_are_the_models():
    model, prompt, _, _ = pair("gemma2 with a soft cap", 100)
    torch.testing.assert_close(prompt.logits, model(words(100)).logits[0, -1])


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next with linear layers", "lfm2 with convolutions"])
def test_caches_of_one_prompt_do_not_touch_each_other(name):
    model, prompt, made, _ = pair(name, 300)
    before = copy.deepcopy(prompt.full.layers)
    full = prompt.cache(None)
    first = [continue_with(model, cache, words(60, seed=2), prompt.logits) for cache in (made, full)]
    for layer, kept in zip(prompt.full.layers, before, strict=True):
        assert_same(leaves(layer), leaves(kept))
    again = [continue_with(model, prompt.cache(p), words(60, seed=2), prompt.logits) for p in (made.plan, None)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(*first)


def test_a_layer_that_is_not_packed_is_still_known_to_its_neighbours():
    model, _, made, called = pair("gemma3", 300)
    for cache in (made, called):
        with pytest.raises(UnsupportedInput):
            model(words(1), past_key_values=cache, attention_mask=torch.ones(1, 7))
    assert made.layers[1].shared.broken == called.layers[1].shared.broken is True
    assert [layer.get_seq_length() for layer in made.layers] == [layer.get_seq_length() for layer in called.layers]


@torch.no_grad()
def token_by_token(model, cache, ids: Tensor, first_logits: Tensor) -> Tensor:
    parts = [first_logits[None]]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(ids.shape[1] - 1)]
    return torch.cat(parts)


def same_reading(a: Tensor, b: Tensor) -> bool:
    """Whether logits are equal but for rounding, which flips a stored scale here and there."""
    moved = (a - b).abs().amax(-1)
    return float(moved.median()) < 1e-3 and float(moved.max()) < 0.05


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("chosen", [*METHODS.values(), None], ids=[*METHODS, "full"])
@pytest.mark.parametrize("tokens", PROMPTS.values(), ids=PROMPTS)
def test_continuing_equals_decoding_token_by_token(tokens, chosen):
    model = TINY["llama"].build(torch.float64)
    plan = chosen and plan_for(model.config, chosen)
    prompt, more = Prompt.read(model, words(tokens)), words(300, seed=2)
    fast = continue_with(model, prompt.cache(plan), more, prompt.logits)
    slow = token_by_token(model, prompt.cache(plan), more, prompt.logits)
    assert same_reading(fast, slow)


def test_one_step_for_all_tokens_is_something_else():
    model, prompt, made, called = pair("llama", 100)
    more = words(200, seed=2)
    slow = continue_with(model, made, more, prompt.logits)
    with torch.no_grad():
        rest = model(more[:, :-1], past_key_values=called).logits[0]
    assert same_reading(slow[1:28], rest[:27])
    assert not same_reading(slow[1:], rest)


def test_one_token_to_predict_needs_no_step():
    model, prompt, made, _ = pair("llama", 40)
    assert torch.equal(continue_with(model, made, words(1), prompt.logits), prompt.logits[None])
    assert made.get_seq_length() == 40


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "full"])
def test_greedy_says_what_generate_says(packs):
    model, prompt, made, _ = pair("llama", 250)
    cache, fresh = (made, PackedCache(model, plan=made.plan)) if packs else (prompt.cache(None), DynamicCache())
    ids = words(250)
    sequence = model.generate(ids, past_key_values=fresh, max_new_tokens=20, do_sample=False)
    assert greedy(model, cache, prompt.logits, 20) == sequence[0, 250:].tolist()
    assert cache.get_seq_length() == fresh.get_seq_length() == 250 + 19


def test_greedy_ends_before_a_stop_token_and_is_as_long_as_allowed_without_one():
    model, prompt, _, _ = pair("llama", 40)
    said = greedy(model, prompt.cache(None), prompt.logits, 8)
    assert len(said) == 8
    stop = next(token for token in said if token != said[0])
    ended = greedy(model, prompt.cache(None), prompt.logits, 8, {stop})
    assert ended == said[: said.index(stop)]
    assert greedy(model, prompt.cache(None), prompt.logits, 8, {said[0]}) == []
    assert greedy(model, prompt.cache(None), prompt.logits, 0) == []


@pytest.mark.parametrize("shape", [(1, 0), (2, 5), (5,)], ids=str)
def test_ids_that_are_no_single_text_are_refused(shape):
    model, prompt, made, _ = pair("llama", 40)
    ids = torch.full(shape, 5)
    with pytest.raises(UnsupportedInput, match=r"allowed: one text of at least one token, \[1, T\]"):
        Prompt.read(model, ids)
    with pytest.raises(UnsupportedInput, match=r"allowed: one text of at least one token, \[1, T\]"):
        continue_with(model, made, ids, prompt.logits)
