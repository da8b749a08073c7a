"""Advice on layers whose best method is known, and none where nothing is gained."""

from dataclasses import replace

import pytest

from occamkv.analysis import advice
from occamkv.analysis.advice import MARGIN, advise
from occamkv.analysis.errors import LayerErrors
from occamkv.analysis.sinks import find_sinks
from occamkv.cache import LayerPlan
from occamkv.methods import method
from some_trace import TOKENS, fixed_where_looked_at, layer

TEXTS = [f"t{i}" for i in range(TOKENS)]


def advised(given, base: str = "oscar", **overrides):
    entry = LayerPlan(0, method(base, **overrides))
    return advise(entry, LayerErrors(given), find_sinks(given, TEXTS))


def test_a_plain_rotation_is_taken_out_where_it_hurts():
    found = advised(fixed_where_looked_at(), "oscar")
    assert found.method.k_rotation == "none"
    assert "no rotation" in found.why
    assert "instead of hadamard" in found.why


def test_the_balanced_rotation_stays_where_a_plain_one_hurts():
    found = advised(fixed_where_looked_at(), "occam")
    assert found.method.k_rotation == "balanced"
    assert found.method == method("occam", pins=found.method.pins)


@pytest.mark.parametrize("base", ["oscar", "occam", "kivi", "rtn", "quarot"])
@pytest.mark.parametrize("seed", range(3))
def test_noise_changes_nothing(base, seed):
    found = advised(layer(seed=seed), base)
    assert found.method == method(base, pins="none")
    assert "nothing else lowers it" in found.why


def test_a_change_must_gain_more_than_the_margin(monkeypatch):
    errors = {("hadamard", True): 1.0, ("none", True): MARGIN + 0.01, ("none", False): 0.9, ("hadamard", False): 0.9}

    def error(_self, one, *, pins=0):
        return errors[one.k_rotation, one.packed_format.token_scale]

    monkeypatch.setattr(advice.LayerErrors, "error", error)
    assert advised(layer()).method.k_rotation == "hadamard"
    errors["none", True] = MARGIN - 0.01
    changed = advised(layer()).method
    assert (changed.k_rotation, changed.packed_format.token_scale) == ("none", True)
    errors["none", False] = MARGIN * errors["none", True] + 0.01
    assert advised(layer()).method == changed
    errors["none", False] = MARGIN * errors["none", True] - 0.01
    assert not advised(layer()).method.packed_format.token_scale


@pytest.mark.parametrize(
    ("sink_at", "pins"), [(None, "none"), (0, "first:4"), (3, "first:4"), (4, "first:4+found"), (70, "first:4+found")]
)
def test_pins_go_where_the_sink_is(sink_at, pins):
    found = advised(layer(sink_at=sink_at))
    assert found.method.pins == pins
    if sink_at == 70:
        assert "at 70" in found.why


def test_many_tokens_that_stick_out_by_norm_are_pinned_too_and_few_are_not():
    given = layer()
    for count, pins in ((7, "none"), (8, "first:4+found")):
        v = given.v.clone()
        v[:, :, 10 : 10 + 30 * count : 30] *= 0.1
        assert advised(replace(given, v=v)).method.pins == pins


def test_a_layer_that_is_not_packed_stays_so_with_its_reason():
    given = layer(window=64)
    found = advise(LayerPlan(0, method("full"), "sliding window"), LayerErrors(given), find_sinks(given, TEXTS))
    assert (found.method.name, found.why) == ("full", "sliding window")
