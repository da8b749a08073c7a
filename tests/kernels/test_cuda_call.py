"""What a call of the CUDA kernel keeps from one step to the next, and what a graph under capture may not ask for."""

from functools import cache

import pytest
import torch

import emulated_cuda
from emulated_cuda import Emulated, native
from occamkv.errors import UnsupportedInput
from occamkv.kernels.cuda import attention, call, launching
from some_attention import METHODS, Held, make_case

needs_emulator = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


@pytest.fixture
def prepared():
    """Prepares a call of one sequence, the same one every time."""
    case = make_case(METHODS["kivi"], held=(Held(0, 9, 5),))
    packed = native(case.packed)
    given = {"q_positions": case.q_positions, "packed": packed, "full": case.full, "packed_splits": 2}
    return lambda **other: call.prepare(case.q, options=call.Options(), **(given | other))[0]


def test_a_second_step_sets_no_memory_to_zero(prepared, monkeypatch):
    first = prepared().arguments.counters
    monkeypatch.setattr(torch, "zeros", None)
    assert prepared().arguments.counters == first


def test_two_streams_and_a_graph_count_apart(prepared, monkeypatch):
    streams = [(0, 0), (5, 0), (5, 1), (5, 2)]
    monkeypatch.setattr(launching, "stream_of", lambda device: streams[0])
    counters = set()
    while streams:
        prepared()  # its slabs were copied before the graph
        counters.add(prepared().arguments.counters)
        del streams[0]
    assert len(counters) == 4


@needs_emulator
@pytest.mark.parametrize("splits", [1, 3])
def test_a_step_leaves_its_counters_as_it_found_them(splits):
    case = make_case(METHODS["kivi"], held=(Held(0, 9, 5),), gqa=3)
    case.attend(Emulated(packed_splits=splits))
    counters = call._counters(1024, torch.device("cpu"), (0, 0))
    assert not counters.any()


@needs_emulator
@pytest.mark.emulator
def test_twin_counters_left_behind_are_noticed(monkeypatch, tmp_path):
    wrong = ("combine.cuh", "if (shared.is_last) *counter = 0;", "")
    with emulated_cuda.mutated(monkeypatch, tmp_path, *wrong), monkeypatch.context() as patch:
        patch.setattr(call, "_counters", cache(call._counters))
        with pytest.raises(AssertionError):
            test_a_step_leaves_its_counters_as_it_found_them(3)


def test_a_graph_cannot_hold_a_pool_that_has_grown(prepared, monkeypatch):
    monkeypatch.setattr(launching, "stream_of", lambda device: (5, 1))
    call._slab_table.cache_clear()
    with pytest.raises(UnsupportedInput, match="has grown since the last step"):
        prepared()
    monkeypatch.setattr(launching, "stream_of", lambda device: (5, 0))
    prepared()
    monkeypatch.setattr(launching, "stream_of", lambda device: (5, 1))
    prepared()


def test_the_slabs_that_a_graph_reads_stay_where_they_are(prepared, monkeypatch):
    prepared()
    monkeypatch.setattr(launching, "stream_of", lambda device: (5, 1))
    place = prepared().arguments.slabs
    call._slab_table.cache_clear()
    assert place in {table.data_ptr() for table in call._IN_GRAPHS.values()}


@pytest.mark.parametrize(("asked", "graph", "checked"), [("", 0, False), ("1", 0, True), ("1", 3, False)])
def test_tables_on_a_gpu_are_read_back_when_asked_for(asked, graph, checked, monkeypatch):
    monkeypatch.setattr(launching, "stream_of", lambda device: (5, graph))
    monkeypatch.setenv(attention.CHECK_VARIABLE, asked)
    assert attention._reads_back(torch.device("cuda")) == checked
    assert attention._reads_back(torch.device("cpu"))
