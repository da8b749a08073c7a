"""What is left of a cache when recorded steps go wrong before their end."""

import copy

import pytest
import torch

from cache_mirror import page_of
from deferred_stepper import DeferredStepper
from integrations import test_captured
from occamkv import kernels
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.integrations.transformers.replay import CapturedStep

graphs, model = test_captured.graphs, test_captured.model


@torch.no_grad()
def test_bad_values_in_replays_are_told_to_all_who_come_before_the_end(model):
    cache = test_captured.read_prompt(model, "kivi", {0: 200, 1: 200})
    captured = CapturedStep(model, cache, steps=20)
    captured(test_captured.tokens_of(1))
    model.model.layers[1].self_attn.v_proj.weight.data[0] *= float("nan")
    captured(test_captured.tokens_of(1))
    for _ in range(2):
        with pytest.raises(UnsupportedInput, match="cannot be packed"):
            cache.crop(-1)
    with pytest.raises(UnsupportedInput, match="cannot be packed"):
        captured.close()
    with pytest.raises(CacheMismatch, match=r"reset\(\) it first"):
        model(test_captured.tokens_of(1), past_key_values=cache)


def test_what_was_reserved_goes_back_when_a_later_layer_fails(model, monkeypatch):
    cache = test_captured.read_prompt(model, "oscar")
    held, backend = cache.nbytes(), kernels.backend("reference")
    made, layers = backend.stepper, []

    def fails(layer):
        layers.append(layer)
        if len(layers) == len(cache.layers):
            raise MemoryError("no room")
        return made(layer)

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="no room"):
        patch.setattr(backend, "stepper", fails)
        CapturedStep(model, cache, steps=500)
    assert cache.nbytes() == held
    copy.deepcopy(cache)


@pytest.mark.parametrize(
    ("method", "steps"), [("oscar", 200), ("oscar_roll", 40)], ids=["new page", "page begun before"]
)
def test_bad_bytes_that_replays_have_packed_are_found_at_the_end(method, steps, model):
    cache = test_captured.read_prompt(model, method)
    captured = CapturedStep(model, cache, steps=200)
    for step in test_captured.tokens_of(steps).split(1, dim=1):
        captured(step)
    store = cache.layers[1].cache.store
    slab, page = page_of(store.pool.slabs, store.pool.starts, store.rows[0].pages[-1])
    slab.records[page] = 0xFF
    with pytest.raises(UnsupportedInput, match="held a NaN, an infinity"):
        captured.close()


def test_a_sequence_that_waits_for_min_tokens_in_a_ring_of_usual_size_is_not_replayed(model):
    cache = test_captured.read_prompt(model, "oscar", {0: 330, 1: 100}, min_tokens=150)
    with pytest.raises(UnsupportedInput, match="below min_tokens"):
        CapturedStep(model, cache, steps=40)


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_a_bad_token_that_would_be_packed_at_once_is_refused(bad, model, monkeypatch):
    cache = test_captured.read_prompt(model, "kivi")
    before = cache.layers[1].cache.packed_tokens()
    while max(row.residual for row in cache.layers[1].cache.store.rows) < 127:
        test_captured.eager(model, cache, test_captured.tokens_of(1))
    model.model.layers[1].self_attn.v_proj.weight.data[0] *= bad
    taken, run = [], DeferredStepper._run
    monkeypatch.setattr(DeferredStepper, "_run", lambda *given, **more: taken.append(given) or run(*given, **more))
    with pytest.raises(UnsupportedInput):
        test_captured.eager(model, cache, test_captured.tokens_of(1))
    assert cache.layers[1].cache.packed_tokens() == before
    assert len(taken) == 1, "layer 0 alone: a GPU would tell only later"
