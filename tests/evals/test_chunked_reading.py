"""Reading in the steps of `chunk_ends` gives what decoding token by token gives.

Sums in another order move K and V by a rounding error. Where that changes a stored scale or code, the records differ
in a few bytes and the logits after that flush move by little; before it they are equal within rounding.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import saved_models
from cache_mirror import records_of
from occamkv import Method, PackedCache, method
from occamkv.evals import Tally, chunk_ends, compare, fidelity

TOKENS = 400
ROUNDING = 1e-4  # of logits up to 6
FLIPPED = 0.05  # what a flipped scale or code may move them
FLIPPED_BYTES = 0.005
METHODS = {
    "oscar": method("oscar"),
    "oscar_roll": method("oscar_roll"),
    "oscar with 4 pins": method("oscar", pins="first:4"),
    "oscar_g64_roll with 4 pins": method("oscar_g64_roll", pins="first:4"),
    **{name: method(name) for name in ("occam", "occam_small", "occam_quality", "ott", "turboquant")},
}
pytestmark = pytest.mark.usefixtures("reference_only")
every_method = pytest.mark.parametrize("name", METHODS)


class Reading(NamedTuple):
    """Logits `[T - 1, V]`, the packed bytes of each layer, `[n, H, bytes]`, and where its pins stand."""

    logits: Tensor
    records: list[Tensor]
    pins: list[list[int]]


@functools.cache
def model():
    return saved_models.build("packable")


def ids() -> Tensor:
    return torch.randint(4, 96, (1, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def read(chosen: Method, ends: Sequence[int], *, min_tokens: int = 0) -> Reading:
    """Read the text in steps that end there."""
    cache = PackedCache(model(), chosen, min_tokens=min_tokens)
    steps = itertools.pairwise([0, *ends])
    logits = torch.cat([model()(ids()[:, a:b], past_key_values=cache).logits[0] for a, b in steps])
    return Reading(logits[:-1], records(cache), [layer.cache.store.rows[0].pins for layer in cache.layers])


def records(cache: PackedCache) -> list[Tensor]:
    for layer in cache.layers:
        layer.cache.commit()
    return [records_of(layer.cache, 0)[0] for layer in cache.layers]


@functools.cache
def token_by_token(name: str) -> Reading:
    return read(METHODS[name], range(1, TOKENS + 1))


def first_flip(a: Reading, b: Reading, chosen: Method) -> int:
    """Return the length at which the first record was packed in which two readings differ; the text's if none does."""
    flipped = [(x != y).any(-1).any(-1).nonzero() for x, y in zip(a.records, b.records, strict=True)]
    record = min((int(x[0]) for x in flipped if len(x)), default=None)
    if record is None:
        return TOKENS
    token = record * chosen.packed_format.record_tokens
    return next(length for length in range(TOKENS + 1) if chosen.packed_tokens(length) > token)


def same_reading(a: Reading, b: Reading, chosen: Method) -> bool:
    """Whether two readings agree as the head of this file says."""
    if [x.shape for x in a.records] != [x.shape for x in b.records] or a.pins != b.pins:
        return False
    bytes_flipped = max(float((x != y).float().mean()) for x, y in zip(a.records, b.records, strict=True))
    moved, safe = (a.logits - b.logits).abs().amax(-1), first_flip(a, b, chosen)
    until = float(moved[:safe].max())
    return until < ROUNDING and float(moved.max()) < FLIPPED and bytes_flipped < FLIPPED_BYTES


@every_method
def test_reading_in_chunks_equals_decoding_token_by_token(name):
    chosen = METHODS[name]
    chunked = read(chosen, chunk_ends(chosen, start=0, end=TOKENS))
    assert sum(x.numel() for x in chunked.records) > 0
    assert same_reading(chunked, token_by_token(name), chosen)


class Recorder(Tally):
    """A tally that keeps the packed run's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def add(self, full: Tensor, packed: Tensor, targets: Tensor) -> None:
        """Keep and pass on."""
        self.logits.append(packed)
        super().add(full, packed, targets)


@every_method
def test_compare_reads_like_decoding_token_by_token(name, monkeypatch):
    recorder, chosen = Recorder(), METHODS[name]
    monkeypatch.setattr(fidelity, "Tally", lambda: recorder)
    compare(model(), ids(), chosen, score_from=0, tally=Tally())
    packed = read(chosen, chunk_ends(chosen, start=0, end=TOKENS))  # its records are those that `compare` packs
    assert same_reading(packed._replace(logits=torch.cat(recorder.logits)), token_by_token(name), chosen)


def test_compare_with_min_tokens_reads_like_decoding_token_by_token(monkeypatch):
    chosen, recorder = METHODS["occam"], Recorder()
    expected = read(chosen, range(1, TOKENS + 1), min_tokens=300)
    monkeypatch.setattr(fidelity, "Tally", lambda: recorder)
    compare(model(), ids(), chosen, score_from=0, min_tokens=300, tally=Tally())
    assert same_reading(expected._replace(logits=torch.cat(recorder.logits)), expected, chosen)


@torch.no_grad()
@pytest.mark.parametrize("name", ["oscar_roll", "occam_quality", "ott"])
def test_reading_the_head_in_one_call_equals_decoding_the_tail_token_by_token(name):
    chosen, head = METHODS[name], 270
    slow = read(chosen, [head, *range(head + 1, TOKENS + 1)])
    fast = read(chosen, [head, *chunk_ends(chosen, start=head, end=TOKENS)])
    assert same_reading(fast, slow, chosen)


WRONG_STEPS = {
    "in one shot": ("oscar", [TOKENS]),
    "in steps of 100": ("oscar", [100, 200, 300, 400]),
    "one token too late": ("oscar", [129, 257, 385, 400]),
    "rolling in blocks": ("oscar_roll", [128, 256, 384, 400]),
    "without the pins": ("oscar with 4 pins", [128, 256, 384, 400]),
    "as if nothing were pinned by its norm": ("ott", [128, 256, 384, 400]),
    "in blocks behind found pins": ("occam_quality", [4, 132, 260, 388, 400]),
}


@pytest.mark.parametrize(("name", "ends"), WRONG_STEPS.values(), ids=WRONG_STEPS)
def test_other_steps_read_something_else(name, ends):
    assert not same_reading(read(METHODS[name], ends), token_by_token(name), METHODS[name])


def test_a_flipped_record_is_no_excuse_for_a_token_before_it():
    chosen, right = METHODS["oscar_roll"], token_by_token("oscar_roll")
    flipped = [x.clone() for x in right.records]
    flipped[1][3, 0, 5] ^= 1
    assert first_flip(right, right, chosen) == TOKENS
    assert first_flip(right._replace(records=flipped), right, chosen) == 128 + 3 * 32
    for at, excused in ((128 + 3 * 32 - 1, False), (128 + 3 * 32, True)):
        logits = right.logits.clone()
        logits[at, 0] += 10 * ROUNDING
        assert same_reading(Reading(logits, flipped, right.pins), right, chosen) == excused
