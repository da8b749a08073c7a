"""Where steps end, against a cache that is simulated token by token: nobody may read past a flush."""

import itertools

import pytest

from occamkv import Method, method
from occamkv.evals import chunk_ends

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
