"""Threads: how the work is shared changes nothing but the rounding of a join; calls from many threads and children."""

import ctypes
import os
import threading
import time
from functools import cache

import pytest
import torch

from attention_truth import relative_error
from occamkv.kernels.cpu import library
from some_attention import METHODS, Case, Held, backend_or_skip, cpu_backends, make_case

FORM = METHODS["kivi-k3v4-with-8-bit-metadata"]
RAGGED_AND_LONG = (Held(0, 61, 3), Held(2, 17, 127), Held(1, 0, 5), Held(0, 33, 9, pads=2))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


@pytest.fixture
def threads():
    """Sets how many threads torch has, and gives the old number back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cache
def cases() -> tuple[Case, ...]:
    """One sequence, whose pages are shared among threads, and several with little or nothing to share."""
    one = make_case(FORM, gqa=3, queries=3, held=RAGGED_AND_LONG[:1])
    return one, make_case(FORM, gqa=3, queries=3, held=RAGGED_AND_LONG)


@cpu_backends
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_threads(threads, backend, count):
    for case in cases():
        target = backend_or_skip(backend, FORM)
        alone = case.attend(target, window=1500)
        threads(count)
        case.check(target, window=1500)
        shared = case.attend(target, window=1500)
        assert relative_error(shared, alone.double()) < 2e-7
        assert all(torch.equal(case.attend(target, window=1500), shared) for _ in range(5)), "the same bits again"
        threads(1)


@cpu_backends
def test_twin_pages_of_a_long_sequence_are_shared(threads, backend):
    """Another number of threads joins other parts, so bits differ; if none ever did, nothing was shared."""
    case, target = cases()[0], backend_or_skip(backend, FORM)
    alone = case.attend(target)
    differ = []
    for count in (2, 3):
        threads(count)
        differ.append(not torch.equal(case.attend(target), alone))
    assert any(differ)


@cpu_backends
@pytest.mark.parametrize("count", [1, 2])
def test_calls_at_the_same_time_give_what_they_give_alone(threads, backend, count):
    target, turns = backend_or_skip(backend, FORM), 20
    threads(count)
    expected = [case.attend(target) for case in cases()]
    wrong = []

    def call(number: int) -> None:
        torch.set_num_threads(count)  # a new thread starts with torch's default
        for _ in range(turns):
            if not torch.equal(cases()[number].attend(target), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(i % 2,)) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@cpu_backends
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_can_attend_with_several_threads(threads, backend):
    case, target = cases()[0], backend_or_skip(backend, FORM)
    threads(3)
    expected = case.attend(target)
    child = os.fork()
    if child == 0:
        try:  # torch's own threads do not outlive a fork, so nothing here may take them
            same = bytes(case.attend(target).numpy()) == bytes(expected.numpy())
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def ticks_during(call) -> int:
    """How often another Python thread gets its turn during a call."""
    ticks, stop = [], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    try:
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
    finally:
        stop.set()
        other.join()
    return sum(begin + 0.002 < at < end - 0.002 for at in ticks)


def lasting(target, seconds: float) -> Case:
    """A case whose call lasts so long."""
    for rows in (2**i for i in range(3, 16)):
        case = cases()[0].repeated(rows)
        begin = time.perf_counter()
        case.attend(target)
        if time.perf_counter() - begin > seconds:
            return case
    raise AssertionError("a call of 32768 sequences takes no time")


@cpu_backends
def test_other_python_threads_go_on_during_a_call(backend):
    target = backend_or_skip(backend, FORM)
    case = lasting(target, 0.05)
    assert max(ticks_during(lambda: case.attend(target)) for _ in range(3)) >= 3


def test_twin_a_call_that_holds_the_interpreter_is_noticed(monkeypatch):
    target = backend_or_skip("cpu", FORM)
    case, native = lasting(target, 0.05), library.library()
    holding = ctypes.PyDLL(native._name)
    holding.okv_attend_run.argtypes = native.okv_attend_run.argtypes
    monkeypatch.setattr(library, "library", lambda: holding)
    assert max(ticks_during(lambda: case.attend(target)) for _ in range(3)) < 3
