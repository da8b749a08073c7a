"""Packed tokens between which others are pinned: a backend must know the position of each."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occamkv.kernels.contract import positions_of
from some_attention import METHODS, Case, Held, attend_backends, backend_or_skip, make_case

BEHIND_ALL = 2**62

PINS = [[0, 1, 50, 51, 199], [7, 31, 32], []]
HELD = tuple(Held(len(pins), groups, residual) for pins, groups, residual in zip(PINS, (7, 4, 3), (20, 3, 90)))  # noqa: B905


def skip_table(pins: list[list[int]]) -> torch.Tensor:
    """Of each pin the number of the packed token behind it; short rows end in a number above every token's."""
    longest = max(map(len, pins))
    rows = [[at - before for before, at in enumerate(row)] for row in pins]
    return torch.tensor([row + [BEHIND_ALL] * (longest - len(row)) for row in rows])


def positions_behind(pins: list[int], count: int) -> list[int]:
    """Positions of the first `count` tokens that are not pinned."""
    return [at for at in range(count + len(pins)) if at not in pins][:count]


def with_pins_in_between(case: Case) -> Case:
    """Pins first in `case` move in between its packed tokens; tokens behind them stay where they are."""
    packed, (pinned, *rest) = case.packed, case.full
    positions, slots = case.positions.clone(), pinned.positions.clone()
    longest = int(packed.lengths.max())
    for row, pins in enumerate(PINS):
        count = int(packed.lengths[row])
        assert all(at < count + len(pins) for at in pins)
        positions[row, :count] = torch.tensor(positions_behind(pins, count))
        slots[row, : len(pins)] = torch.tensor(pins, dtype=torch.int64)
    positions[:, longest : longest + slots.shape[1]] = slots
    packed = replace(packed, first_position=torch.zeros_like(packed.first_position), skips=skip_table(PINS))
    return replace(case, packed=packed, full=[replace(pinned, positions=slots), *rest], positions=positions)


def boolean_mask(case: Case) -> torch.Tensor:
    shape = (len(PINS), 1, case.q.shape[2], case.mask_positions)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


OPTIONS = {
    "causal": lambda case: {},
    "window": lambda case: {"window": 150},
    "mask": lambda case: {"mask": boolean_mask(case)},
    "mask and window": lambda case: {"mask": boolean_mask(case), "window": 150},
}


@attend_backends
@pytest.mark.parametrize("name", ["oscar", "quarot", "lloyd-max-levels-of-2.5-and-3-bits"])
@pytest.mark.parametrize("option", OPTIONS)
def test_attention_knows_the_positions_of_tokens_behind_pins(backend, option, name):
    case = with_pins_in_between(make_case(METHODS[name], held=HELD, gqa=2))
    case.check(backend_or_skip(backend, METHODS[name]), **OPTIONS[option](case))


@attend_backends
@pytest.mark.parametrize("option", ["window", "mask"])
def test_twin_a_backend_that_takes_all_pins_for_the_first_tokens_is_seen(backend, option):
    case = with_pins_in_between(make_case(METHODS["oscar"], held=HELD))
    options = OPTIONS[option](case)
    wrong = case.with_packed(skips=None, first_position=torch.tensor([len(pins) for pins in PINS]))
    with pytest.raises(AssertionError):
        wrong.check(backend_or_skip(backend, METHODS["oscar"]), **options)


@given(st.lists(st.sets(st.integers(0, 60), max_size=12), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_positions_are_those_that_no_pin_has(sets):
    pins = [sorted(row) for row in sets]
    numbers = torch.arange(50).expand(len(pins), -1)
    said = positions_of(numbers, skip_table(pins).reshape(len(pins), -1).to(torch.int64))
    assert said.tolist() == [positions_behind(row, 50) for row in pins]
