"""Bootstrap intervals against a loop over draws, and against what normal theory says."""

import random
import statistics

import pytest
import torch

from occamkv.evals import intervals
from occamkv.evals.intervals import bootstrap


def loop(groups, *, seed: int, resamples: int) -> tuple[float, float]:
    """Draw groups one at a time; quantiles by linear interpolation between the sorted means."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(groups), (resamples, len(groups)), generator=generator).tolist()
    means = sorted(statistics.fmean([v for i in draw for v in groups[i]]) for draw in draws)

    def quantile(q: float) -> float:
        at = q * (resamples - 1)
        low = int(at)
        return means[low] + (at - low) * (means[min(low + 1, resamples - 1)] - means[low])

    return quantile(0.025), quantile(0.975)


def some_values(count: int, *, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(3, 2) for _ in range(count)]


UNEVEN = [[1.0, 2.0, 9.0], [4.0], [0.0, 0.5], [7.0, 7.0, 7.0, 8.0]]


def test_the_interval_of_single_values_is_that_of_a_loop():
    values = some_values(23)
    assert bootstrap(values, seed=5, resamples=300) == pytest.approx(loop([[v] for v in values], seed=5, resamples=300))


def test_groups_are_drawn_whole_and_weigh_as_much_as_they_hold():
    interval = bootstrap(UNEVEN, seed=5, resamples=300)
    assert interval == pytest.approx(loop(UNEVEN, seed=5, resamples=300))
    means = [[statistics.fmean(group)] for group in UNEVEN]
    assert interval != pytest.approx(loop(means, seed=5, resamples=300), abs=0.01)


def test_draws_in_parts_are_the_same_draws(monkeypatch):
    values = some_values(40)
    whole = bootstrap(values, seed=1)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 40 * 64)
    assert bootstrap(values, seed=1) == whole


def test_many_values_have_the_interval_of_normal_theory():
    values = some_values(400)
    low, high = bootstrap(values, seed=0, resamples=20_000)
    half = 1.96 * statistics.stdev(values) / 400**0.5
    mean = statistics.fmean(values)
    assert low == pytest.approx(mean - half, abs=0.05 * half)
    assert high == pytest.approx(mean + half, abs=0.05 * half)


def test_equal_values_in_a_group_add_no_certainty():
    values = some_values(30)
    repeated = bootstrap([[v] * 10 for v in values], seed=2)
    assert repeated == pytest.approx(bootstrap(values, seed=2))
    low, high = bootstrap([v for v in values for _ in range(10)], seed=2)
    assert high - low < 0.5 * (repeated[1] - repeated[0])


def test_a_seed_gives_one_interval_and_another_seed_another():
    values = some_values(30)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)


NOTHING_TO_SAY = {"nothing": [], "one value": [1.0], "one group": [[1.0, 2.0]], "one group and an empty": [[1.0], []]}


@pytest.mark.parametrize("values", NOTHING_TO_SAY.values(), ids=NOTHING_TO_SAY)
def test_less_than_two_values_or_groups_have_no_interval(values):
    assert bootstrap(values, seed=0) is None
