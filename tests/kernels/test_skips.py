"""Pins in the midst of packed tokens: every backend finds the positions that they leave, against float64 attention."""

import random
from dataclasses import replace

import pytest
import torch

from occamkv import kernels
from some_attention import ASKS_AND_FINDS, METHODS, RAGGED, Case, Held, attend_backends, backend_or_skip, make_case

FORMS = {name: METHODS[name] for name in ("oscar", "rtn")} | {"occam": ASKS_AND_FINDS["occam"]}
SCATTERED = (Held(9, 5, 20), Held(2, 0, 3), Held(1, 3, 127), Held(4, 2, 40, pads=2), Held(0, 1, 5))
every_form = pytest.mark.parametrize("name", FORMS)


def scattered(case: Case, held: tuple[Held, ...], *, seed: int = 0) -> Case:
    """The same tokens, but pins lie anywhere among those held, and the others close up around them."""
    rng, size = random.Random(seed), case.packed.format.record_tokens
    longest = max(h.pins for h in held)
    skips = torch.full((len(held), longest), 10**9)
    full, positions = list(case.full), case.positions.clone()
    moved = [part.positions.clone() for part in full[:2]]
    for row, h in enumerate(held):
        packed = h.groups * size
        everything = range(h.pins + packed + h.residual)
        pins = sorted(rng.sample(everything, h.pins))
        others = [at for at in everything if at not in pins]
        skips[row, : h.pins] = torch.tensor([sum(at < pin for at in others) for pin in pins])
        new_place = dict(enumerate([*pins, *others]))  # made with pins first; position by position
        for part in moved:
            part[row] = torch.tensor([new_place.get(at, -1) for at in part[row].tolist()])
        before_new = positions.shape[1] - full[-1].k.shape[2]
        old = positions[row, :before_new].tolist()
        positions[row, :before_new] = torch.tensor([new_place.get(at, -1) for at in old])
    full[:2] = [replace(part, positions=at) for part, at in zip(full[:2], moved, strict=True)]
    packed = replace(case.packed, skips=skips, first_position=torch.zeros(len(held), dtype=torch.int64))
    return replace(case, full=full, positions=positions, packed=packed)


def masks(case: Case, *, per_head: bool) -> torch.Tensor:
    shape = (case.q.shape[0], case.q.shape[1] if per_head else 1, case.q.shape[2], case.mask_positions)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.6


OPTIONS = {
    "causal": lambda case: {},
    "sliding window": lambda case: {"window": 40},
    "mask": lambda case: {"mask": masks(case, per_head=False)},
    "additive mask per head": lambda case: {
        "mask": torch.zeros(1).masked_fill(~masks(case, per_head=True), float("-inf"))
    },
    "window, mask, soft cap": lambda case: {"window": 90, "mask": masks(case, per_head=True), "softcap": 3.0},
}


@attend_backends
@every_form
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_over_tokens_with_pins_in_their_midst(backend, name, option, dtype):
    for seed in range(3):
        case = make_case(FORMS[name], gqa=2, held=SCATTERED, dtype=dtype, seed=seed)
        case = scattered(case, SCATTERED, seed=seed)
        case.check(backend_or_skip(backend, FORMS[name]), **OPTIONS[option](case))


@attend_backends
def test_skips_without_pins_change_nothing(backend):
    held = tuple(h._replace(pins=0) for h in RAGGED)
    case, target = make_case(METHODS["oscar"], held=held), backend_or_skip(backend, METHODS["oscar"])
    for width in (0, 3):
        given = case.with_packed(skips=torch.full((3, width), 10**9))
        assert torch.equal(given.attend(target, window=50), case.attend(target, window=50))


WRONG = {
    "without skips": lambda packed: {"skips": None},
    "skips one too late": lambda packed: {"skips": packed.skips + 1},
    "skips of the other sequences": lambda packed: {"skips": packed.skips.flip(0)},
    "first positions counted twice": lambda packed: {"first_position": (packed.skips < 10**9).sum(1)},
}


@pytest.mark.parametrize("what", WRONG)
def test_twin_wrong_positions_break_the_check(what):
    case = scattered(make_case(METHODS["oscar"], held=SCATTERED), SCATTERED)
    with pytest.raises(AssertionError, match="error"):
        case.with_packed(**WRONG[what](case.packed)).check(kernels.backend("reference"), **OPTIONS["mask"](case))
