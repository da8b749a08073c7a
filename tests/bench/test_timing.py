"""Contestants take turns, a slow one is seen to be slow, and which clock counts."""

import time

import pytest
import torch

from occamkv.bench import timing
from occamkv.bench.timing import Contestant, Times, race, torch_threads


def busy(seconds: float) -> None:
    """Use the CPU for so long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def names_called(**options) -> list[str]:
    calls: list[str] = []
    race([Contestant(name, lambda name=name: calls.append(name)) for name in "abc"], **options)
    return calls


def test_contestants_take_turns_after_a_warm_up():
    assert names_called(repetitions=5) == list("abc" * 6)


def test_without_a_warm_up_the_first_call_counts():
    assert names_called(repetitions=2, warm_up=False) == list("abcabc")


def test_what_prepares_a_call_is_done_before_each_and_not_timed():
    calls: list[str] = []
    slow = Contestant("x", lambda: calls.append("call"), lambda: (calls.append("prepare"), time.sleep(0.06)))
    found = race([slow], repetitions=3)["x"]
    assert calls == ["prepare", "call"] * 4
    assert max(found.wall_ms) < 50


def test_a_contestant_that_works_longer_is_reported_slower_on_both_clocks():
    found = race([Contestant("quick", lambda: busy(0.001)), Contestant("slow", lambda: busy(0.006))], repetitions=5)
    assert found["slow"].to_json()["cpu_ms"] > 3 * found["quick"].to_json()["cpu_ms"]
    assert found["slow"].to_json()["wall_ms_min"] > 3 * found["quick"].to_json()["wall_ms_min"]
    assert 5.5 < found["slow"].ms < 12


def test_sleeping_is_wall_time_and_no_cpu_time():
    found = race([Contestant("sleeper", lambda: time.sleep(0.01))], repetitions=3)["sleeper"]
    assert found.to_json()["wall_ms"] > 9
    assert found.ms == found.to_json()["cpu_ms"] < 5


def test_with_more_threads_only_wall_time_counts():
    found = race([Contestant("sleeper", lambda: time.sleep(0.01))], repetitions=3, threads=2)["sleeper"]
    assert found.cpu_ms is None
    assert found.to_json()["cpu_ms"] is found.to_json()["cpu_ms_min"] is None
    assert found.ms > 9


def test_a_contestant_slower_than_the_limit_has_fewer_turns_but_enough(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_SECONDS", 0.04)
    found = race([Contestant("quick", int), Contestant("slow", lambda: time.sleep(0.05))], repetitions=8)
    assert {name: len(times.wall_ms) for name, times in found.items()} == {"quick": 8, "slow": timing.MIN_REPETITIONS}


def test_times_are_of_one_step():
    times = {n: race([Contestant("x", lambda: busy(0.008))], repetitions=3, per_call=n)["x"].ms for n in (1, 4)}
    assert times[4] == pytest.approx(times[1] / 4, rel=0.3)


def test_medians_and_minima():
    assert Times((3.0, 1.0, 9.0), (2.0, 8.0, 1.0)).to_json() == {
        "cpu_ms": 2.0,
        "cpu_ms_min": 1.0,
        "wall_ms": 3.0,
        "wall_ms_min": 1.0,
        "repetitions": 3,
    }


def test_each_round_is_told():
    ticks: list[int] = []
    race([Contestant("x", int)], repetitions=6, tick=lambda: ticks.append(1))
    assert len(ticks) == 7


def test_threads_are_set_inside_and_given_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == before


def test_contestants_run_with_the_threads_that_were_asked_for():
    seen: list[int] = []
    race([Contestant("x", lambda: seen.append(torch.get_num_threads()))], repetitions=1, threads=2)
    assert seen == [2, 2]
