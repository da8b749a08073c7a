"""From what was found to a row, against figures that numpy and the hand compute."""

import itertools
import random

import numpy as np
import pytest

from occamkv import method
from occamkv.cache import LayerPlan, Plan
from occamkv.evals.rows import Outcome, bins, clusters, make_row

PLAN = Plan((LayerPlan(0, method("oscar")), LayerPlan(1, method("full"), "window"), LayerPlan(2, method("ott"))))
FIRST = 40


def window(tokens: int, *, seed: int, layers: tuple[float, ...] = (0.3, 0.4)) -> dict:
    draw = random.Random(seed)
    return {
        "kl": [draw.expovariate(5) for _ in range(tokens)],
        "same": [int(draw.random() < 0.7) for _ in range(tokens)],
        "nll": [draw.uniform(0, 5) for _ in range(tokens)],
        "nll_full": [draw.uniform(0, 4) for _ in range(tokens)],
        "bits_per_value": 2.5 + seed / 100,
        "bits_with_residual": 4.0 + seed / 10,
        "cache_bytes": 1000 + seed,
        "full_bytes": 8000,
        "packed_layers": 2,
        "layers": 3,
        "tokens": FIRST + tokens + 1,
        "layer_errors": [[layer, error * (1 + seed)] for layer, error in zip((0, 2), layers, strict=True)],
    }


def row(outcome: Outcome) -> dict:
    return make_row("mine", PLAN, outcome, first=FIRST, seed=3)


@pytest.mark.parametrize("windows", [1, 2, 7])
def test_figures_are_over_all_scored_positions_of_all_windows(windows):
    outcome = Outcome([window(300, seed=i) for i in range(windows)])
    kl, same, nll, nll_full = (
        np.concatenate([w[key] for w in outcome.windows]) for key in ("kl", "same", "nll", "nll_full")
    )
    given = row(outcome)
    expected = {
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "same_top": same.mean(),
        "perplexity": np.exp(nll.mean()),
        "perplexity_full": np.exp(nll_full.mean()),
        "bits_per_value": np.mean([2.5 + i / 100 for i in range(windows)]),
        "bits_with_residual": np.mean([4.0 + i / 10 for i in range(windows)]),
        "positions": 300 * windows,
        "tokens": FIRST + 301,
        "packed_layers": 2,
        "layers": 3,
        "full_bytes": 8000,
    }
    assert {key: given[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    assert given["cache_bytes"] == round(1000 + (windows - 1) / 2)
    assert type(given["cache_bytes"]) is int
    assert given["source"] == "Su et al. 2025, arXiv:2505.10938, Su et al. 2026, arXiv:2605.19660"


@pytest.mark.parametrize("windows", [1, 2, 7])
def test_intervals_hold_their_mean_and_are_the_same_again(windows):
    outcome = Outcome([window(600, seed=i) for i in range(windows)])
    given = row(outcome)
    for key in ("kl_mean", "same_top"):
        low, high = given[f"{key}_ci"]
        assert low < given[key] < high
    assert given == row(outcome)


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_an_interval_resamples_windows_or_of_few_blocks_of_256(count):
    windows = [list(range(1000 * i, 1000 * i + 600)) for i in range(count)]
    groups = clusters(windows)
    assert [len(group) for group in groups] == ([600] * count if count >= 5 else [256, 256, 88] * count)
    assert list(itertools.chain(*groups)) == list(itertools.chain(*windows))


@pytest.mark.parametrize(
    ("length", "width", "first"), [(300, 128, 40), (256, 128, 0), (1, 8, 5), (24, 8, 0), (7, 8, 0)]
)
def test_bins_cover_each_position_once_with_its_mean(length, width, first):
    windows = [window(length, seed=i)["kl"] for i in range(3)]
    found = bins(windows, width=width, first=first)
    covered = [position for one in found for position in range(one["first"], one["last"] + 1)]
    assert covered == list(range(first, first + length))
    for one in found:
        values = [w[p - first] for w in windows for p in range(one["first"], one["last"] + 1)]
        assert one["count"] == len(values)
        assert one["kl"] == pytest.approx(np.mean(values))
    assert all(one["last"] - one["first"] == width - 1 for one in found[:-1])


def test_bins_of_a_row_begin_at_the_first_scored_position():
    found = row(Outcome([window(300, seed=0)]))["kl_by_position"]
    assert [(one["first"], one["last"]) for one in found] == [(40, 167), (168, 295), (296, 339)]


def test_layer_errors_are_root_mean_squares_over_windows():
    outcome = Outcome([window(10, seed=0), window(10, seed=1)])
    errors = {one["layer"]: one["error"] for one in row(outcome)["layer_errors"]}
    assert errors == pytest.approx({0: np.sqrt((0.3**2 + 0.6**2) / 2), 2: np.sqrt((0.4**2 + 0.8**2) / 2)})


def test_what_was_not_measured_is_not_in_the_row():
    outcome = Outcome([window(10, seed=0) | {"layer_errors": []}])
    full = make_row("full", Plan((LayerPlan(0, method("full"), "asked for"),)), outcome, first=0, seed=0)
    assert not {"source", "layer_errors", "generated", "probes", "tasks"} & set(full)


def test_agreement_ends_at_the_first_other_token():
    same = [[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    outcome = Outcome([window(10, seed=0)], [{"same": s, "kl": [0.1, 0.2, 0.3, 0.4]} for s in same])
    generated = row(outcome)["generated"]
    assert (generated["tokens"], generated["prompts"]) == (4, 3)
    assert generated["agreement_length_mean"] == (2 + 0 + 4) / 3
    assert generated["agreement_share"] == 10 / 12
    assert generated["kl_by_index"] == [{"first": 0, "last": 3, "kl": pytest.approx(0.25), "count": 12}]


def test_probes_are_counted_by_kind_length_and_depth():
    probes = [
        {"kind": kind, "length": 768, "depth": depth, "exact": exact, "logprob": logprob}
        for kind, depth, exact, logprob in [
            ("needle", 0.0, True, -0.1),
            ("needle", 0.5, False, -2.0),
            ("needle", 0.0, False, -0.5),
            ("quote", 0.0, True, -0.4),
        ]
    ]
    found = row(Outcome([window(10, seed=0)], probes=probes))["probes"]
    assert (found["exact"], found["count"], found["logprob"]) == (0.5, 4, pytest.approx(-0.75))
    assert found["logprob_ci"][0] <= -0.75 <= found["logprob_ci"][1]
    cells = {(c["kind"], c["length"], c["depth"]): (c["exact"], c["logprob"], c["count"]) for c in found["cells"]}
    assert cells == {
        ("needle", 768, 0.0): (0.5, pytest.approx(-0.3), 2),
        ("needle", 768, 0.5): (0.0, -2.0, 1),
        ("quote", 768, 0.0): (1.0, -0.4, 1),
    }


def test_tasks_say_how_many_answers_were_cut_off_or_invalid():
    answers = [(True, False), (False, True), (True, True), (False, True)]
    task = {
        "task": "gsm8k",
        "score": 0.5,
        "scores": {"flexible": 0.5, "strict": 0.25},
        "mean_new_tokens": 12.5,
        "rows": [{"truncated": truncated, "valid": valid} for truncated, valid in answers],
    }
    (found,) = row(Outcome([window(10, seed=0)], tasks=[task]))["tasks"]
    assert (found["truncated"], found["invalid"], found["count"], found["generated_mean"]) == (2, 1, 4, 12.5)
    assert (found["task"], found["metric"], found["score"], found["scores"]["strict"]) == (
        "gsm8k",
        "flexible",
        0.5,
        0.25,
    )
