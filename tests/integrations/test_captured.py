"""A recorded decode step: replays give the logits of eager steps, and the cache is afterwards what they would leave.

Graphs are those of `deferred_stepper`: a replay is the recorded call again with the counts of the host left alone.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

import emulated_cuda
import host_syncs
from cache_mirror import assert_same_contents, contents
from deferred_stepper import stepping
from integrations.architectures import TINY
from integrations.steps import difference, prompt, words
from occamkv import PackedCache, kernels
from occamkv.cache import LayerCache
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.evals.controls import packed_bytes
from occamkv.integrations.transformers import attention, replay
from occamkv.integrations.transformers.replay import CapturedStep, refuses_device
from occamkv.methods import Method
from occamkv.methods import method as method_named

LLAMA = TINY["llama"]
RAGGED = {0: 330, 1: 200}


@pytest.fixture(autouse=True)
def graphs():
    with pytest.MonkeyPatch.context() as patch, stepping("reference") as made:  # ends after a test's own monkeypatch
        patch.setattr(kernels, "BACKENDS", ("reference",))
        yield made


@pytest.fixture
def model() -> nn.Module:
    return LLAMA.build()


@torch.no_grad()
def read_prompt(model: nn.Module, method: str, rows: dict[int, int] = RAGGED, **options) -> PackedCache:
    given = prompt(LLAMA, rows)
    cache = PackedCache(model, method, **options)
    places = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**given, position_ids=places, past_key_values=cache)
    return cache


def tokens_of(count: int, rows: int = 2) -> Tensor:
    return torch.stack([words(count, row=row, seed=5) for row in range(rows)])


@torch.no_grad()
def eager(model: nn.Module, cache: PackedCache, tokens: Tensor) -> Tensor:
    """Logits of steps that the model takes itself, `[B, n, V]`."""
    made = []
    cache.layers[0].cache.commit()
    for step in tokens.split(1, dim=1):
        at = torch.tensor([[row.tokens] for row in cache.layers[0].cache._tokens.rows])
        made.append(model(input_ids=step, position_ids=at, past_key_values=cache).logits)
    return torch.cat(made, dim=1)


def assert_same_cache(first: PackedCache, second: PackedCache) -> None:
    for a, b in zip(first.layers, second.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        assert [row.counts for row in a.cache.store.rows] == [row.counts for row in b.cache.store.rows]
        if a.cache.batch == 1:  # several sequences may hold slabs of which some pages are free
            assert a.cache.nbytes() == b.cache.nbytes()
        for row in range(a.cache.batch):
            assert_same_contents(contents(a.cache, row), contents(b.cache, row))


@pytest.mark.parametrize(
    ("method", "rows", "steps"),
    [
        pytest.param("occam", RAGGED, 140, id="occam-ragged", marks=pytest.mark.emulator),
        pytest.param("oscar", RAGGED, 200, id="oscar-ragged"),
        pytest.param("oscar_k3v4_m8_roll", {0: 150}, 140, id="8-bit-metadata-one", marks=pytest.mark.emulator),
        pytest.param("kivi_g64", {0: 12, 1: 5}, 280, id="kivi-short"),
        pytest.param("quarot", {0: 120, 1: 3}, 40, id="quarot-one-packs", marks=pytest.mark.emulator),
    ],
)
def test_replays_give_the_logits_and_the_cache_of_eager_steps(method, rows, steps, model, graphs):
    tokens = tokens_of(steps, len(rows))
    cache, other = (read_prompt(model, method, rows) for _ in range(2))
    with CapturedStep(model, cache, steps=steps + 7) as captured:
        logits = torch.cat([captured(step) for step in tokens.split(1, dim=1)], dim=1)
        assert graphs.replays == steps - 1
        assert cache.get_seq_length() == max(rows.values()) + steps
    expected = eager(model, other, tokens)
    assert difference(logits, expected) < 1e-5
    assert_same_cache(cache, other)
    later = tokens_of(3, len(rows))
    assert difference(eager(model, cache, later), eager(model, other, later)) < 1e-5


@pytest.mark.emulator
@pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))
@pytest.mark.parametrize("method", ["occam", "oscar"])
def test_replays_on_the_cuda_backend(method, model, monkeypatch):
    monkeypatch.setattr(kernels, "BACKENDS", ("cuda",))
    tokens = tokens_of(60)
    with emulated_cuda.on_cpu(), stepping("cuda"):
        cache, other = (read_prompt(model, method) for _ in range(2))
        with CapturedStep(model, cache, steps=60) as captured:
            logits = torch.cat([captured(step) for step in tokens.split(1, dim=1)], dim=1)
        assert {layer.backend for layer in cache.report().layers} == {"cuda"}
        assert difference(logits, eager(model, other, tokens)) < 1e-5
        assert_same_cache(cache, other)


def test_the_cache_can_be_read_between_replays(model):
    tokens = tokens_of(80)
    cache, other = (read_prompt(model, "oscar_roll") for _ in range(2))
    with CapturedStep(model, cache, steps=80) as captured:
        for number, step in enumerate(tokens.split(1, dim=1)):
            got, expected = captured(step), eager(model, other, step)
            assert difference(got, expected) < 1e-5
            if number % 9 == 5:  # in eager steps nothing is left over, and what is read is the same
                for mine, theirs in zip(cache.layers, other.layers, strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(mine.dense(), theirs.dense(), strict=True))
                assert cache.report().layers[0].packed_tokens == other.report().layers[0].packed_tokens
    assert_same_cache(cache, other)


def test_eager_steps_may_come_between(model):
    tokens = tokens_of(75)
    cache, other = (read_prompt(model, "oscar") for _ in range(2))
    expected = eager(model, other, tokens)
    made = []
    with CapturedStep(model, cache, steps=75) as captured:
        for number, step in enumerate(tokens.split(1, dim=1)):
            if number % 4 == 3:
                made.append(eager(model, cache, step))
            else:
                made.append(captured(step))
    assert difference(torch.cat(made, dim=1), expected) < 1e-5
    assert_same_cache(cache, other)


def test_an_eager_step_beyond_what_was_reserved_packs_what_a_replay_has_left_over(model):
    """After 5 steps the first sequence owes a flush; the next step gives the second one a page."""
    cache, other = (read_prompt(model, "occam", {0: 287, 1: 254}) for _ in range(2))
    tokens = tokens_of(40)
    captured = CapturedStep(model, cache, steps=5)
    for step in tokens[:, :5].split(1, dim=1):
        captured(step)
    assert max(captured._layers[0][1].stepper.held) == 128
    expected = eager(model, other, tokens)[:, 5:]
    assert difference(eager(model, cache, tokens[:, 5:]), expected) < 1e-5
    captured.close()
    assert_same_cache(cache, other)


def test_twin_a_flush_that_was_forgotten_is_noticed(model, monkeypatch):
    tokens = tokens_of(56)
    cache, other = (read_prompt(model, "oscar_roll") for _ in range(2))
    eager(model, other, tokens)
    owed = []
    with CapturedStep(model, cache, steps=56) as captured:
        for step in tokens.split(1, dim=1):
            captured(step)
            stepper = cache.layers[0].cache._stepping.stepper
            owed.append(max(stepper.held))
        assert max(owed) == 128, "a flush waits for the next step"
        assert max(stepper.held) == 128
        for layer in cache.layers:
            monkeypatch.setattr(layer.cache._stepping.stepper, "settle", lambda: None)
    with pytest.raises(AssertionError):
        assert_same_cache(cache, other)


def test_sequences_that_share_a_page_write_into_their_own(model):
    tokens, caches = tokens_of(40), [read_prompt(model, "oscar_roll", {0: 330}) for _ in range(2)]
    for cache in caches:
        cache.batch_repeat_interleave(2)
    with CapturedStep(model, caches[0], steps=40) as captured:
        logits = torch.cat([captured(step) for step in tokens.split(1, dim=1)], dim=1)
    assert difference(logits, eager(model, caches[1], tokens)) < 1e-5
    assert_same_cache(*caches)


def test_pages_that_were_not_needed_go_back(model):
    cache, other = (read_prompt(model, "oscar") for _ in range(2))
    held = cache.layers[0].cache.nbytes()
    captured = CapturedStep(model, cache, steps=2000)
    assert cache.layers[0].cache.nbytes()["packed"] > 2 * held["packed"]
    captured(tokens_of(1))
    captured.close()
    assert cache.layers[0].cache.nbytes() == held
    eager(model, other, tokens_of(1))
    assert_same_cache(cache, other)


CHANGES = {
    "crop": lambda model, cache: cache.crop(-1),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda model, cache: cache.reset(),
    "two tokens": lambda model, cache: model(tokens_of(2), past_key_values=cache),
    "closed": None,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_cache_that_was_changed_is_not_replayed(change, model, graphs):
    cache = read_prompt(model, "oscar_roll", {0: 200, 1: 200})
    captured = CapturedStep(model, cache, steps=50)
    for step in tokens_of(40).split(1, dim=1):
        captured(step)
    length, replays = cache.get_seq_length(), graphs.replays
    captured.close() if change == "closed" else CHANGES[change](model, cache)
    if change == "two tokens":
        cache.layers[0].cache.commit()
    with pytest.raises(CacheMismatch, match="closed, or the cache was changed"):
        captured(tokens_of(1))
    captured.close()
    assert graphs.replays == replays and cache.get_seq_length() in (length, length - 1, length + 2, 0)


def test_more_steps_than_announced_and_other_shapes_are_refused(model):
    with CapturedStep(model, read_prompt(model, "oscar"), steps=2) as captured:
        with pytest.raises(UnsupportedInput, match=r"\(2, 2\); allowed: \(2, 1\)"):
            captured(tokens_of(2))
        for step in tokens_of(2).split(1, dim=1):
            captured(step)
        with pytest.raises(UnsupportedInput, match="all steps that were announced"):
            captured(tokens_of(1))
    with CapturedStep(model, read_prompt(model, "oscar"), steps=2) as captured:
        eager(model, captured._cache, tokens_of(2))
        with pytest.raises(UnsupportedInput, match="all steps that were announced"):
            captured(tokens_of(1))
    with pytest.raises(UnsupportedInput, match="steps is 0"):
        CapturedStep(model, read_prompt(model, "oscar"), steps=0)


REFUSED = {
    "no prompt": ("oscar", {}, "holds no prompt"),
    "pins that are found": ("occam_quality", {}, "found by their norms"),
    "a window": ("streaming", {}, "leave the window"),
    "min_tokens": ("oscar", {"min_tokens": 1000}, "below min_tokens"),
    "pins ahead": ("at", {}, "named positions"),
    "verify": ("oscar", {"verify": True}, "looked at in every step"),
    "random signs": ("turboquant", {}, "no call for a whole step"),
}


def some_method(name: str) -> Method:
    if name == "streaming":
        return method_named("oscar", window=256)
    return method_named("oscar", pins="at:0,350") if name == "at" else method_named(name)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_recorded_is_refused_and_goes_on(what, model, monkeypatch):
    name, options, told = REFUSED[what]
    form = some_method(name)
    cache = PackedCache(model, form, **options) if what == "no prompt" else read_prompt(model, form, **options)
    with pytest.raises(UnsupportedInput, match=told):
        CapturedStep(model, cache, steps=100)
    if what != "no prompt":
        eager(model, cache, tokens_of(3))
        assert cache.get_seq_length() == 333


def test_frequencies_that_follow_the_length_are_refused(model):
    cache = read_prompt(model, "oscar")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedInput, match="looks at positions in each step"):
        CapturedStep(model, cache, steps=5)


@torch.no_grad()
def test_backends_without_steps_devices_without_graphs_and_layers_that_grow_are_refused(model, monkeypatch):
    cache = read_prompt(model, "oscar")
    held = cache.nbytes()
    with monkeypatch.context() as patch:  # undone before what the fixture has put there
        patch.setattr(kernels.backend("reference"), "stepper", lambda layer: None)
        with pytest.raises(UnsupportedInput, match="reference has no call for a whole step"):
            CapturedStep(model, cache, steps=500)
    assert cache.nbytes() == held
    monkeypatch.setattr(replay, "refuses_device", refuses_device)
    with pytest.raises(UnsupportedInput, match="the cache lies on cpu"):
        CapturedStep(model, cache, steps=5)
    mixed = TINY["gemma3"].build()
    half = PackedCache(mixed, "oscar")
    mixed(words(200)[None], past_key_values=half)
    with pytest.raises(UnsupportedInput, match="layer 0 is not packed"):
        CapturedStep(mixed, half, steps=5)


def test_without_memory_for_a_layer_the_cache_is_an_ordinary_one_again(model, monkeypatch):
    cache, reserve = read_prompt(model, "oscar", {0: 200}), LayerCache.reserve

    def full(layer, *args, **options):
        if layer is cache.layers[-1].cache:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reserve(layer, *args, **options)

    before = cache.nbytes()
    monkeypatch.setattr(LayerCache, "reserve", full)
    with pytest.raises(torch.OutOfMemoryError):
        CapturedStep(model, cache, steps=500)
    assert cache.nbytes() == before
    copy.deepcopy(cache)


def test_a_ragged_batch_is_not_described_anew_for_every_page(model, graphs):
    rows = {row: 130 + 17 * row for row in range(6)}
    cache = read_prompt(model, "oscar", rows)
    eager(model, cache, tokens_of(3, 6))
    before = len(graphs.steppers)
    eager(model, cache, tokens_of(280, 6))
    made = (len(graphs.steppers) - before) / len(cache.layers)
    packed = sum(row.packed // 128 - 1 for row in cache.layers[0].cache._tokens.rows)
    assert made <= 4 < 12 <= packed, "each time a page ahead for all"
    _, stored, computed = packed_bytes(cache)
    page = cache.layers[0].cache.store.format.page_bytes(kv_heads=2, head_dim=32)
    assert computed <= stored < computed + 6 * page * len(cache.layers)
    eager(model, cache, tokens_of(2, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
@torch.no_grad()
def test_bad_values_in_replays_are_found_at_the_end_and_the_cache_asks_for_a_reset(bad, model):
    cache = read_prompt(model, "kivi")
    captured = CapturedStep(model, cache, steps=20)
    for step in tokens_of(5).split(1, dim=1):
        captured(step)
    weight = model.model.layers[1].self_attn.v_proj.weight
    good = weight.data[0].clone()
    weight.data[0] *= bad
    captured(tokens_of(1))
    with pytest.raises(UnsupportedInput, match="cannot be packed"):
        captured.close()
    weight.data[0] = good
    with pytest.raises(CacheMismatch, match=r"reset\(\) it first"):
        model(tokens_of(1), past_key_values=cache)
    cache.reset()
    model(tokens_of(200), past_key_values=cache)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_bad_values_in_eager_steps_on_a_device_are_found_before_they_are_packed(bad, model):
    cache = read_prompt(model, "kivi")
    eager(model, cache, tokens_of(3))
    weight = model.model.layers[1].self_attn.v_proj.weight
    good = weight.data[0].clone()
    weight.data[0] *= bad
    eager(model, cache, tokens_of(1))
    weight.data[0] = good
    before = cache.layers[1].cache.packed_tokens()
    with pytest.raises(UnsupportedInput, match=r"one of the newest .* tokens cannot be packed"):
        eager(model, cache, tokens_of(128))
    assert cache.layers[1].cache.packed_tokens() == before
    cache.crop(-(cache.get_seq_length() - 333))
    eager(model, cache, tokens_of(128))
    assert min(cache.layers[1].cache.packed_tokens()) > min(before)


def test_a_cache_in_replay_is_not_copied(model):
    cache = read_prompt(model, "oscar")
    with CapturedStep(model, cache, steps=5) as captured:
        captured(tokens_of(1))
        with pytest.raises(UnsupportedInput, match="close"):
            copy.deepcopy(cache)
    copy.deepcopy(cache)


# -- nothing waits for the device --------------------------------------------------------------------------------


@torch.no_grad()
def plain_step(model: nn.Module, cache: PackedCache, at: Tensor) -> None:
    model(input_ids=torch.full((len(at), 1), 7), position_ids=at, past_key_values=cache)


@pytest.mark.parametrize("method", ["oscar", "occam", "kivi"])
def test_a_plain_step_waits_for_nothing(method, model):
    cache = read_prompt(model, method)
    at, ids = torch.tensor([[330], [200]]), torch.full((2, 1), 7)
    plain_step(model, cache, at)
    with torch.no_grad(), host_syncs.none_allowed():
        for _ in range(3):
            model(input_ids=ids, position_ids=at, past_key_values=cache)
    assert cache.get_seq_length() == 334 and cache.report().layers[0].reads_packed == 4


@pytest.mark.parametrize("mask", [attention.step_mask, masking_utils.sdpa_mask], ids=["ours", "twin-transformers"])
def test_a_step_has_no_mask_where_transformers_makes_one_for_graphs(mask, model, monkeypatch):
    """While a graph is captured, transformers 5.17 leaves no mask out."""
    cache, at = read_prompt(model, "oscar"), torch.tensor([[330], [200]])
    plain_step(model, cache, at)
    monkeypatch.setattr(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention.NAME, mask)
    twin = mask is masking_utils.sdpa_mask
    with pytest.raises(host_syncs.HostSync) if twin else nullcontext(), host_syncs.none_allowed():
        plain_step(model, cache, at)


def test_twin_a_step_that_looks_at_numbers_is_noticed(model, monkeypatch):
    cache = read_prompt(model, "oscar")
    at, ids = torch.tensor([[330], [200]]), torch.full((2, 1), 7)
    plain_step(model, cache, at)
    monkeypatch.setattr("occamkv.cache.layer.on_host", lambda x: True)
    with torch.no_grad(), host_syncs.none_allowed(), pytest.raises(host_syncs.HostSync, match="_local_scalar_dense"):
        model(input_ids=ids, position_ids=at, past_key_values=cache)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1]),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.masked_select(x > 0),
        torch.unique,
    ],
)
def test_twin_each_way_to_wait_is_noticed(act):
    x = torch.ones(3)
    act(x)
    with host_syncs.none_allowed(), pytest.raises(host_syncs.HostSync):
        act(x)
