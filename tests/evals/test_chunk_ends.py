"""Where steps end, against a cache that is simulated token by token: nobody may read past a flush."""

import itertools

import pytest

from cache_mirror import Mirror
from occamkv import Method, method
from occamkv.cache import LayerPlan, Plan
from occamkv.evals import chunk_ends
from occamkv.evals.fidelity import step_ends

RESIDUAL = 128
METHODS = {
    "oscar": method("oscar"),
    "oscar_roll": method("oscar_roll"),
    "oscar_g64_roll": method("oscar_g64_roll"),
    "oscar_g128_roll": method("oscar_g128_roll"),
    "oscar_g64": method("oscar_g64"),
    "quarot_roll, groups of channels": method("quarot_roll"),
    "oscar with 4 pins": method("oscar", pins="first:4"),
    "oscar_roll with 4 pins": method("oscar_roll", pins="first:4"),
    "oscar_g64_roll with 33 pins": method("oscar_g64_roll", pins="first:33"),
    "oscar with 200 pins": method("oscar", pins="first:200"),
}
RANGES = [(0, 400), (0, 1), (0, 127), (0, 128), (0, 129), (3, 140), (128, 400), (130, 700), (131, 132), (257, 258)]

every_method = pytest.mark.parametrize("chosen", METHODS.values(), ids=METHODS)
every_range = pytest.mark.parametrize(("start", "end"), RANGES, ids=lambda n: str(n))


def flushes(chosen: Method, *, start: int, end: int) -> list[int]:
    """Return the lengths at which something is packed when tokens come one at a time after `start` in one call."""
    pins = 0 if chosen.pins == "none" else int(chosen.pins.removeprefix("first:"))
    group = (
        RESIDUAL if chosen.flush == "block" else (chosen.format.k_group if chosen.format.k_axis == "channel" else 32)
    )
    residual, packed_at = 0, []

    def put(tokens: int, length: int) -> None:
        nonlocal residual
        residual += tokens
        before = residual
        while residual >= RESIDUAL:
            residual -= group
        if residual < before:
            packed_at.append(length)

    put(max(0, start - pins), start)
    packed_at.clear()
    for length in range(start + 1, end + 1):
        if length > pins:
            put(1, length)
    return packed_at


def read_past(ends: list[int], chosen: Method, *, start: int, end: int) -> list[int]:
    """Return the flushes inside a step: queries of that step would read older tokens unpacked, or a flush too late."""
    return sorted(set(flushes(chosen, start=start, end=end)) - set(ends))


@every_method
@every_range
def test_steps_are_in_order_and_cover_the_whole_text(chosen, start, end):
    ends = chunk_ends(chosen, start=start, end=end)
    assert ends[-1] == end
    assert all(a < b for a, b in itertools.pairwise([start, *ends]))


@every_method
@every_range
def test_no_step_goes_past_a_flush(chosen, start, end):
    assert read_past(chunk_ends(chosen, start=start, end=end), chosen, start=start, end=end) == []


@every_method
def test_once_packing_has_begun_a_step_ends_only_at_a_flush_or_at_the_end(chosen):
    ends = chunk_ends(chosen, start=0, end=1000)
    due = flushes(chosen, start=0, end=1000)
    assert [end for end in ends if end >= due[0]] == sorted({*due, 1000})


@every_method
def test_a_step_ends_with_the_pins(chosen):
    if chosen.pinned_tokens:
        assert chosen.pinned_tokens in chunk_ends(chosen, start=0, end=1000)


def test_nothing_to_read_makes_no_step():
    assert chunk_ends(method("oscar"), start=50, end=50) == []


def test_the_simulation_packs_where_the_design_says():
    assert flushes(METHODS["oscar"], start=0, end=400) == [128, 256, 384]
    assert flushes(METHODS["oscar_roll"], start=0, end=200) == [128, 160, 192]
    assert flushes(METHODS["oscar_g64_roll with 33 pins"], start=0, end=300) == [161, 225, 289]
    assert flushes(METHODS["oscar with 4 pins"], start=130, end=400) == [132, 260, 388]


@pytest.mark.parametrize(
    ("chosen", "ends"),
    [
        pytest.param("oscar_roll", range(128, 401, 128), id="rolling in steps of a block"),
        pytest.param("oscar with 4 pins", range(128, 401, 128), id="block without the pins"),
        pytest.param("oscar", [*range(100, 401, 100)], id="steps of 100"),
        pytest.param("oscar", [400], id="one shot"),
    ],
)
def test_wrong_steps_are_found(chosen, ends):
    assert read_past([*ends], METHODS[chosen], start=0, end=400)


def judged(chosen: Method, *, start: int, end: int) -> list[int]:
    """Return the lengths at which a real cache packs, pins or judges tokens that come one at a time after `start`.

    Every ninth token is one that pins by norms are for.
    """
    mirror = Mirror(chosen)
    seen, found = None, []
    for length in [start] * bool(start) + list(range(start + 1, end + 1)):
        k, v = mirror.fresh(length if length == start else 1)
        v[:, :, -1] *= 0.01 if length % 9 == 0 else 1.0
        mirror.cache.update(k, v)
        mirror.cache.commit()
        row = mirror.cache.store.rows[0]
        now = (row.packed, row.staged, row.pinned - min(row.pinned, chosen.pinned_tokens))
        if seen is not None and now != seen:
            found.append(length)
        seen = now
    return found


BY_NORM = {
    "found": method("oscar_g64_roll", pins="first:4+found"),
    "found, blocks": method("oscar", pins="first:0+found"),
    "lowest": method("ott"),
    "lowest, rolling": method("kivi_roll", pins="lowest:7"),
}


@pytest.mark.parametrize("start", [0, 131, 200, 260])
@pytest.mark.parametrize("chosen", BY_NORM.values(), ids=BY_NORM)
def test_with_pins_by_norm_steps_end_exactly_where_a_cache_packs_or_judges(chosen, start):
    end = start + 270
    due = judged(chosen, start=start, end=end)
    ends = chunk_ends(chosen, start=start, end=end)
    assert len(due) > 1
    assert [length for length in ends if length >= due[0]] == sorted({*due, end})


def test_the_lowest_pins_are_out_before_the_first_block_is_packed():
    assert judged(BY_NORM["lowest"], start=0, end=270) == [128, 133, 261]


def test_a_plan_ends_its_steps_where_any_of_its_layers_flushes():
    plan = Plan((LayerPlan(0, method("oscar")), LayerPlan(1, method("ott")), LayerPlan(2, method("full"), "window")))
    assert step_ends(plan, start=0, end=300) == [128, 133, 256, 261, 300]


def test_a_plan_that_packs_nothing_is_read_in_the_steps_of_a_page():
    assert step_ends(Plan((LayerPlan(0, method("full")),)), start=0, end=300) == [128, 256, 300]
