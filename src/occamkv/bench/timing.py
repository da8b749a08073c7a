"""Contestants that take turns, so that a slow minute of the machine is everybody's slow minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

MIN_REPETITIONS = 5
SLOW_SECONDS = 0.3
"""A contestant whose warm-up call takes longer has only `MIN_REPETITIONS` turns."""


@dataclass(frozen=True)
class Contestant:
    """A call to be timed, and what has to be done before each call without being timed."""

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Times:
    """Milliseconds of each call; CPU time of the calling thread only where no other thread worked."""

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...] | None = None

    @property
    def ms(self) -> float:
        """The median that counts: of CPU time if there is one, else of wall time."""
        return median(self.wall_ms if self.cpu_ms is None else self.cpu_ms)

    def to_json(self) -> dict[str, Any]:
        """Return medians and minima as JSON-ready data."""
        return {
            "cpu_ms": None if self.cpu_ms is None else median(self.cpu_ms),
            "cpu_ms_min": None if self.cpu_ms is None else min(self.cpu_ms),
            "wall_ms": median(self.wall_ms),
            "wall_ms_min": min(self.wall_ms),
            "repetitions": len(self.wall_ms),
        }


class Sweep:
    """Reads more memory than the CPU's caches hold, so that every contestant finds them as cold as the others do."""

    def __init__(self, nbytes: int = 128 * 2**20) -> None:
        self._memory = torch.zeros(nbytes // 4)

    def __call__(self) -> None:
        """Read it all."""
        self._memory.sum()


def race(
    contestants: Sequence[Contestant],
    *,
    repetitions: int,
    threads: int = 1,
    per_call: int = 1,
    warm_up: bool = True,
    tick: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Time contestants round robin: one call each, then the next round. Return their times by name.

    Args:
        contestants: With different names.
        repetitions: Rounds; a slow contestant sits out those after `MIN_REPETITIONS`.
        threads: Threads of torch; with 1 the CPU time of this thread is taken too.
        per_call: How many equal steps a call makes; times are of one step.
        warm_up: Call each once before, without counting it.
        tick: Called after each round, the one that warms up included.
    """
    turns = {one.name: repetitions for one in contestants}
    taken: dict[str, list[tuple[float, float]]] = {one.name: [] for one in contestants}
    with torch_threads(threads), torch.no_grad():
        if warm_up:
            for one in contestants:
                if _seconds(one)[0] > SLOW_SECONDS:
                    turns[one.name] = min(repetitions, MIN_REPETITIONS)
            if tick is not None:
                tick()
        for turn in range(repetitions):
            for one in contestants:
                if turn < turns[one.name]:
                    taken[one.name].append(_seconds(one))
            if tick is not None:
                tick()
    return {name: _times(found, threads, per_call) for name, found in taken.items()}


def _seconds(one: Contestant) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of this thread of one call."""
    if one.prepare is not None:
        one.prepare()
    wall, cpu = time.perf_counter(), time.thread_time()
    one.call()
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    return wall, cpu


def _times(found: Sequence[tuple[float, float]], threads: int, per_call: int) -> Times:
    wall, cpu = (tuple(1000 * seconds / per_call for seconds in column) for column in zip(*found, strict=True))
    return Times(wall, cpu if threads == 1 else None)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
