"""Controls: they hold for every method, and each fails for a cache or a model that cheats in its way."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import saved_models
from cache_mirror import held_bytes
from occamkv.evals import controls, fidelity
from occamkv.evals.controls import Control
from occamkv.evals.fidelity import Reading, read_together
from occamkv.integrations.transformers import PackedCache, plan_for
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.methods import method

TOKENS = 300
METHODS = ("oscar", "kivi", "occam", "occam_small", "occam_quality", "ott", "turboquant", "rotatekv", "kvarn")


@functools.cache
def model(kind: str):
    return saved_models.build(kind)


def ids() -> Tensor:
    return torch.randint(4, 96, (1, TOKENS), generator=torch.Generator().manual_seed(1))


def read(name: str, *, kind: str = "packable", tokens: int = TOKENS, score_from: int = 100, **options: int) -> Reading:
    plans = {name: plan_for(model(kind).config, name)}
    return read_together(model(kind), ids()[:, :tokens], plans, score_from=score_from, **options)[name]


def flips(reading: Reading, kind: str = "packable") -> Control:
    return controls.flipped_bits_move_logits("x", model(kind), reading, ids()[:, -1:])


@pytest.mark.parametrize("kind", ["packable", "half sliding"])
@pytest.mark.parametrize("name", METHODS)
def test_controls_of_a_packed_reading_hold(name, kind):
    reading = read(name, kind=kind)
    for control in (controls.was_read_packed("x", reading), controls.bytes_match("x", reading), flips(reading, kind)):
        assert control.passed, control
        assert control.name.startswith("x: ")
        assert set(control.to_json()) == {"name", "passed", "told"}


def test_bytes_of_a_window_match_though_tokens_have_left_it():
    plans = {"x": plan_for(model("packable").config, method("oscar", pins="none", window=256))}
    reading = read_together(model("packable"), ids().repeat(1, 3)[:, :700], plans, score_from=100)["x"]
    assert all(layer.dropped_tokens for layer in reading.cache.report().packed_layers)
    control = controls.bytes_match("x", reading)
    assert control.passed, control


def test_full_precision_agrees_with_itself():
    assert controls.full_agrees(read("full")).passed


def test_controls_leave_the_reading_as_it_is():
    reading = read("occam")
    before = [layer.cache.store.pool.slabs[0].records.clone() for layer in reading.cache.layers]
    report = reading.cache.report()
    flips(reading)
    controls.bytes_match("x", reading)
    assert reading.cache.report() == report
    for layer, records in zip(reading.cache.layers, before, strict=True):
        assert torch.equal(layer.cache.store.pool.slabs[0].records, records)


@pytest.mark.parametrize("change", [1e-6, -1e-6, float("nan")])
def test_a_full_reading_that_is_perturbed_at_one_position_fails(change):
    reading = read("full")
    reading.tally.kl[0][3] += change
    assert not controls.full_agrees(reading).passed


def test_a_full_reading_with_one_other_token_fails():
    reading = read("full")
    reading.tally.same[-1][-1] = False
    assert not controls.full_agrees(reading).passed


def test_a_packed_reading_is_no_full_one():
    assert not controls.full_agrees(read("oscar")).passed


def test_a_cache_that_stays_full_fails_every_control():
    reading = read("oscar", min_tokens=10_000)
    assert not controls.was_read_packed("x", reading).passed
    assert not flips(reading).passed


def test_a_cache_without_packed_layers_fails_every_control():
    reading = read("full")
    assert not controls.was_read_packed("x", reading).passed
    assert not controls.bytes_match("x", reading).passed
    assert not flips(reading).passed


def test_a_dense_read_fails():
    reading = read("oscar")
    assert reading.cache.layers[0].keys is not None
    control = controls.was_read_packed("x", reading)
    assert (control.passed, "1 reads were dequantized" in control.told) == (False, True)


def test_a_model_that_reads_dequantized_fails(monkeypatch):
    monkeypatch.setattr(
        PackedLayer, "update", lambda layer, k, v, *_: (layer.cache.update(k, v), layer.cache.dense())[1]
    )
    assert not controls.was_read_packed("x", read("oscar")).passed


def test_a_model_that_ignores_what_is_packed_fails(monkeypatch):
    monkeypatch.setattr(PackedLayer, "update", lambda layer, k, v, *_: (layer.cache.update(k, v), (k, v))[1])
    monkeypatch.setattr(PackedLayer, "get_mask_sizes", lambda layer, length: (length, 0))
    reading = read("oscar")
    assert not controls.was_read_packed("x", reading).passed
    control = flips(reading)
    assert (control.passed, "logits moved for []" in control.told) == (False, True)


def test_a_model_that_ignores_one_layer_fails():
    reading = read("oscar")
    spoiled = saved_models.build("packable")
    spoiled.load_state_dict(model("packable").state_dict())
    spoiled.model.layers[1].self_attn.o_proj.weight.data.zero_()
    control = controls.flipped_bits_move_logits("x", spoiled, reading, ids()[:, -1:])
    assert (control.passed, "logits moved for [0]" in control.told) == (False, True)


def test_a_model_that_answers_by_chance_fails():
    noisy = saved_models.build("packable")
    noisy.lm_head.register_forward_hook(lambda _m, _a, out: out + 1e-3 * torch.randn_like(out))
    control = controls.flipped_bits_move_logits("x", noisy, read("oscar"), ids()[:, -1:])
    assert (control.passed, "gave different logits" in control.told) == (False, True)


@pytest.mark.parametrize("tokens", [128, 129, 131])
@pytest.mark.parametrize("name", ["oscar", "occam", "ott"])
def test_a_text_that_ends_before_a_scored_position_read_packed_bytes_fails(name, tokens):
    last = tokens + {"oscar": 0, "occam": 4, "ott": 5}[name] - 2
    reading = read(name, tokens=last + 1, score_from=0)
    scored_packed = float(torch.cat(reading.tally.kl)[-1]) > 1e-6
    assert controls.was_read_packed("x", reading).passed == scored_packed


def hold_more(reading: Reading) -> None:
    store = reading.cache.layers[1].cache.store
    store.forgotten = torch.zeros(3)


def hold_a_copy(reading: Reading) -> None:
    store = reading.cache.layers[0].cache.store
    store.residual_k = torch.cat((store.residual_k, store.residual_k), dim=2)[:, :, :128]


def hold_a_page_more(reading: Reading) -> None:
    pool = reading.cache.layers[0].cache.store.pool
    pool.reserve(1)
    pool.allocate(1)


def hold_less(reading: Reading) -> None:
    store = reading.cache.layers[0].cache.store
    store.residual_v = store.residual_v[:, :, :64].clone()


WRONG_BYTES: dict[str, Callable[[Reading], None]] = {
    "a tensor that nobody counts": hold_more,
    "a view of something larger": hold_a_copy,
    "a page too many": hold_a_page_more,
    "less than its method says": hold_less,
}


@pytest.mark.parametrize("change", WRONG_BYTES.values(), ids=WRONG_BYTES)
def test_bytes_that_are_not_those_of_the_tensors_fail(change):
    reading = read("oscar")
    change(reading)
    assert not controls.bytes_match("x", reading).passed


def test_a_report_that_says_too_little_fails(monkeypatch):
    reading = read("oscar")
    monkeypatch.setattr(type(reading.cache.layers[0].cache.store), "nbytes", lambda _: dict.fromkeys(PARTS, 1))
    assert not controls.bytes_match("x", reading).passed


PARTS = ("packed", "residual", "pins")


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_told_are_those_that_the_caches_hold(name):
    reading = read(name)
    held = sum(held_bytes(layer.cache) for layer in reading.cache.layers)
    assert f"held by tensors {held}," in controls.bytes_match("x", reading).told


def test_a_reading_goes_through_the_packed_cache(monkeypatch):
    made = []

    class Noted(PackedCache):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(fidelity, "PackedCache", Noted)
    assert read("oscar").cache is made[0]
