"""Rows of `bench_attend`: all contestants in one race, ratios that tell who is slower, errors at one context."""

import time

import pytest

from occamkv.bench import Setting, Shape, attend, bench_attend, stock
from occamkv.bench.timing import Contestant
from occamkv.errors import UnsupportedInput
from occamkv.kernels import reference

SHAPES = [Shape("a", 4, 2, 32), Shape("b", 2, 2, 8)]
STOCK = {f"{name}_{dtype}" for name in ("sdpa_gqa", "sdpa_folded", "manual_folded") for dtype in ("bf16", "fp32")}
SETTING = {"contexts": (300, 200), "repetitions": 5, "backend": "reference"}


@pytest.fixture(scope="module")
def rows():
    return bench_attend(SHAPES, Setting(methods=("occam", "oscar"), threads=(1, 2), **SETTING))


def test_there_is_a_row_for_everything_that_was_asked(rows):
    keys = [(row["shape"], row["context"], row["threads"], row["method"]) for row in rows]
    assert keys == [(s, c, t, m) for s in "ab" for c in (200, 300) for t in (1, 2) for m in ("occam", "oscar")]


def test_ratios_belong_to_the_times(rows):
    for row in rows:
        assert set(row["contestants"]) == STOCK | {"ours"}
        key = "cpu_ms" if row["threads"] == 1 else "wall_ms"
        times = {name: entry[key] for name, entry in row["contestants"].items()}
        assert row["ours_ms"] == times.pop("ours")
        assert row["ratio_enable_gqa"] == pytest.approx(times["sdpa_gqa_bf16"] / row["ours_ms"])
        assert row["best_stock"] == min(times, key=times.get)
        assert row["ratio_best_stock"] == pytest.approx(min(times.values()) / row["ours_ms"])
        assert row["packed_gb_per_s"] == pytest.approx(row["packed_bytes"] / row["ours_ms"] / 1e6)


def test_errors_are_measured_at_the_smallest_context_only(rows):
    assert {row["context"] for row in rows if "errors" in row} == {200}
    for row in (row for row in rows if "errors" in row):
        assert row["errors"]["ours"] < 1e-5 < 1e-4 < row["errors"]["sdpa_gqa_bf16"] < 0.1


def test_methods_take_turns_with_stock_in_one_race(monkeypatch):
    orders = []
    real = attend.race

    def watched(contestants, **options):
        orders.append([one.name for one in contestants])
        return real(contestants, **options)

    monkeypatch.setattr(attend, "race", watched)
    bench_attend(SHAPES[:1], Setting(methods=("occam", "oscar"), **SETTING | {"contexts": (200,)}))
    assert orders == [["occam", "oscar", *[one.name for one in stock.stock_contestants(*three())]]]


def three():
    import torch

    return (torch.zeros(1, 2, 1, 8),) * 3


@pytest.mark.parametrize("slowed", ["sdpa_gqa_bf16", "sdpa_gqa_fp32"])
def test_a_slowed_contestant_is_reported_slower(monkeypatch, slowed):
    real = stock.stock_contestants

    def slower(*given):
        def wait(call):
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            call()

        return [
            Contestant(one.name, (lambda call=one.call: wait(call)) if one.name == slowed else one.call)
            for one in real(*given)
        ]

    monkeypatch.setattr(attend, "stock_contestants", slower)
    (row,) = bench_attend(SHAPES[:1], Setting(**SETTING | {"contexts": (200,)}))
    entries = {name: entry["cpu_ms"] for name, entry in row["contestants"].items()}
    assert entries[slowed] > 19 > 2 * max(ms for name, ms in entries.items() if name != slowed)
    assert row["best_stock"] != slowed
    assert (row["ratio_enable_gqa"] > 2) == (slowed == "sdpa_gqa_bf16")


def test_a_slowed_backend_is_reported_slower(monkeypatch):
    real = reference.attend

    def slow(*args, **kwargs):
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return real(*args, **kwargs)

    monkeypatch.setattr(reference, "attend", slow)
    (row,) = bench_attend(SHAPES[:1], Setting(**SETTING | {"contexts": (200,)}))
    assert row["ours_ms"] > 19
    assert row["ratio_enable_gqa"] < 0.5
    assert row["ratio_best_stock"] < 0.5


def test_a_backend_that_computes_something_else_has_a_large_error(monkeypatch):
    real = reference.attend
    monkeypatch.setattr(reference, "attend", lambda q, **given: real(1.01 * q, **given))
    (row,) = bench_attend(SHAPES[:1], Setting(**SETTING | {"contexts": (200,)}))
    assert row["errors"]["ours"] > 1e-4


def test_several_queries_attend_at_once():
    (row,) = bench_attend(SHAPES[:1], Setting(**SETTING | {"contexts": (200,)}), queries=4)
    assert row["queries"] == 4
    assert row["errors"]["ours"] < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"shapes": []}, "shapes", id="no shapes"),
        pytest.param({"shapes": [SHAPES[0]] * 2}, "'a, a'", id="shape twice"),
        pytest.param({"queries": 0}, "queries are '0'", id="no queries"),
        pytest.param({"queries": 129}, "queries are '129'", id="too many queries"),
        pytest.param({"contexts": (100,)}, "context 100", id="nothing packed"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    setting = Setting(**SETTING | {key: value for key, value in options.items() if key == "contexts"})
    with pytest.raises(UnsupportedInput, match=words):
        bench_attend(options.get("shapes", SHAPES), setting, queries=options.get("queries", 1))


def test_progress_goes_to_the_end_of_each_stage():
    told = []
    bench_attend(SHAPES[:1], Setting(**SETTING), progress=lambda stage, done, total: told.append((stage, done, total)))
    assert len({stage for stage, _, _ in told}) == 2
    assert [(done, total) for _, done, total in told] == [(n, 6) for n in range(1, 7)] * 2
