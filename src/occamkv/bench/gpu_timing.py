"""Times on a GPU: calls are captured in a CUDA graph, contestants take turns, CUDA events are the clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from occamkv.bench.inputs import packed_of, packing_method
from occamkv.bench.timing import MIN_REPETITIONS, Times
from occamkv.errors import OccamError, UnsupportedInput

Clock = Callable[[Sequence[Callable[[], object]]], Callable[[], float]]
"""Takes calls; returns what runs all of them once and tells the milliseconds of one."""

REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError)
"""What torch and others raise when a kernel does not take a shape; memory that is used up is among them."""

_TIMES_L2 = 3
_LEAST_CALLS = 10
_WARM_UPS = 2
_FREE_SHARE = 0.9
_LAUNCH_CYCLES = 2**20  # half a millisecond: longer than it takes to launch a graph


@dataclass(frozen=True)
class Rig:
    """Where and with which clocks something is measured; tests put a CPU and a clock of their own here.

    Args:
        device: Of all tensors.
        replayed: For calls of fixed shapes: a CUDA graph.
        queued: For calls that cannot be captured: one after the other.
        l2_bytes: Of the cache that everything measured must exceed.
        memory_bytes: That may be filled.
    """

    device: torch.device
    replayed: Clock
    queued: Clock
    l2_bytes: int
    memory_bytes: int

    def copies(self, nbytes: int) -> int:
        """Return over how many copies of so many bytes calls must rotate, so that none is found in the cache."""
        return max(1, -(-_TIMES_L2 * self.l2_bytes // nbytes))


def check_turns(methods: Sequence[str], repetitions: int) -> None:
    """Raise `UnsupportedInput` for methods twice or none, and few repetitions."""
    if not methods or len(set(methods)) < len(methods):
        raise UnsupportedInput(f"methods are {', '.join(methods)!r}; allowed: one or more, each once.")
    if repetitions < MIN_REPETITIONS:
        raise UnsupportedInput(f"repetitions is {repetitions}; allowed: {MIN_REPETITIONS} or more.")


def check_setting(
    methods: Sequence[str], repetitions: int, *, budget_seconds: float, shortest: int, newest: int = 1
) -> None:
    """Refuse what no benchmark of a GPU can measure.

    Raises:
        UnsupportedInput: As in `check_turns`; or no time, or nothing packed before the `newest` tokens of the shortest
            context.
    """
    check_turns(methods, repetitions)
    Budget(budget_seconds)
    for name in methods:
        packed_of(packing_method(name), shortest, newest)


def most_calls(repetitions: int) -> int:
    """Return how often a call is made at most in so many turns: more than once a turn where a graph repeats it."""
    return _WARM_UPS + _LEAST_CALLS * (repetitions + 1)


FAILED = "failed:"


class Dropped(Exception):
    """A case that cannot be measured here; the message says why."""


ENDS_A_CASE = (Dropped, RuntimeError, OccamError)
"""What ends a case but not the run: one case must not take the others' times with it."""


def first_line(error: BaseException) -> str:
    """Return what an error says, short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def left_out(error: BaseException) -> str:
    """Return why a case has no row; one that failed, not for want of memory or time, is named so."""
    harmless = isinstance(error, (Dropped, torch.OutOfMemoryError))
    return first_line(error) if harmless else f"{FAILED} {first_line(error)}"


class Budget:
    """Seconds that may be used; a job is started while some are left."""

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise UnsupportedInput(f"budget is {seconds:g} seconds; allowed: more than 0.")
        self._seconds, self._start = seconds, monotonic()

    @property
    def used(self) -> bool:
        """Whether nothing is left."""
        return monotonic() - self._start >= self._seconds


def gpu_rig(name: str) -> Rig:
    """Return the rig of a CUDA device.

    Raises:
        UnsupportedInput: It is no CUDA device, or not here.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    told = f"torch {torch.__version__} finds {found} NVIDIA GPUs here"
    try:
        device = torch.device(name)
        if device.type != "cuda" or (device.index or 0) >= found:
            raise RuntimeError(told)
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        free, _ = torch.cuda.mem_get_info(device)
    except RuntimeError as error:  # no name of a device, or a GPU that does not answer
        raise UnsupportedInput(
            f"device {name!r} cannot be measured: {first_line(error)}; allowed: cpu, and cuda where there is a GPU. "
            "`occamkv doctor` lists what is there."
        ) from error
    return Rig(device, graph_clock, event_clock, properties.L2_cache_size, int(_FREE_SHARE * free))


def gpu_conditions(device: torch.device) -> dict[str, Any]:
    """Return what a measurement says about the GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": str(torch.version.cuda),
        "driver": _driver_version(),
    }


def _driver_version() -> str:
    try:
        told = re.search(r"\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return told[0] if told else "unknown"


def graph_clock(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Capture the calls in one CUDA graph, over and over until there are ten; see `Clock`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for call in calls:
            for _ in range(_WARM_UPS):
                call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = -(-_LEAST_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    return lambda: _event_ms(graph.replay, behind=_LAUNCH_CYCLES) / (len(calls) * rounds)


def event_clock(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Run the calls one after the other, without waiting in between; see `Clock`."""

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    run()
    return lambda: _event_ms(run) / len(calls)


def _event_ms(run: Callable[[], object], *, behind: int = 0) -> float:
    """Return the milliseconds of a run, begun `behind` so many cycles in which the GPU waits and the CPU launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if behind:
        torch.cuda._sleep(behind)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    """Run contestants round robin, after a round that does not count; return their milliseconds by name."""
    for run in contestants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(run())
    return {name: Times(tuple(ms)) for name, ms in found.items()}


def spread(times: Times) -> dict[str, float]:
    """Return median and extremes as JSON-ready data."""
    ms = times.wall_ms
    return {"ms": times.ms, "ms_min": min(ms), "ms_max": max(ms), "repetitions": len(ms)}
