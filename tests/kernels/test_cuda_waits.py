"""A layer cache on the CUDA backend, on a CPU: what a step leaves to the long way, and errors that come late."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor

import emulated_cuda
from attention_truth import relative_error
from cache_mirror import Mirror, assert_same_contents, contents
from kernels.test_cuda_stepping import in_native_order, prompt, with_room
from occamkv.errors import UnsupportedInput
from occamkv.kernels import cuda
from occamkv.kernels.cuda import launching, stepping
from occamkv.methods import Method, method

pytestmark = pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing()))


@pytest.fixture(autouse=True)
def gpu():
    with emulated_cuda.on_cpu():
        yield


def steps(mirror: Mirror, count: int, *, size: float = 1.0) -> list[Tensor]:
    """Take single tokens; K `size` times as large."""
    outs = []
    for _ in range(count):
        k, v = mirror.fresh(1)
        seen = mirror.put(k * size, v)
        outs.append(mirror.cache.attend(torch.ones(2, 4, 1, 32), seen=seen))
    return outs


@pytest.mark.parametrize(
    ("form", "options", "count"),
    [
        pytest.param(method("oscar", window=512), {"tokens": 200}, 60, id="window-before-it-slides"),
        pytest.param(method("oscar_roll", window=256), {"tokens": 300}, 110, id="window-that-slides"),
        pytest.param(
            method("occam"), {"tokens": 190, "pads": 64, "min_tokens": 160}, 60, id="one-waits-for-min-tokens"
        ),
    ],
)
def test_what_waits_and_what_leaves_is_that_of_the_reference(form: Method, options, count, monkeypatch):
    fast, slow = (prompt(form, name, monkeypatch, **options) for name in ("cuda", "reference"))
    made = stepping.LayerStep.__call__
    calls = []
    monkeypatch.setattr(stepping.LayerStep, "__call__", lambda *a, **k: calls.append(k["due"]) or made(*a, **k))
    for a, b in zip(steps(fast, count), steps(slow, count), strict=True):
        assert relative_error(a, b.double()) < 4e-3
    assert len(calls) > count // 2 and any(map(any, calls))
    assert fast.cache.packed_tokens() == slow.cache.packed_tokens()
    in_native_order(slow.cache)
    for row in range(2):
        assert_same_contents(contents(fast.cache, row), contents(slow.cache, row))


def test_sequences_that_share_a_page_write_into_their_own(monkeypatch):
    caches = [prompt(method("occam"), name, monkeypatch) for name in ("cuda", "reference")]
    for mirror in caches:
        mirror.cache.remove(95)  # or tokens that both hold would fill the page
        mirror.cache.select([0, 0])
        mirror.real, mirror.k, mirror.v = mirror.real[[0, 0], :-95], mirror.k[:1] * 2, mirror.v[:1] * 2
        assert mirror.cache.store.rows[0].packed % 128
        steps(mirror, 120)
    in_native_order(caches[1].cache)
    for row in range(2):
        assert_same_contents(*(contents(mirror.cache, row) for mirror in caches))


def test_what_a_step_could_not_store_is_told_until_the_reset_whoever_comes_next(monkeypatch):
    mirror = prompt(method("kivi"), "cuda", monkeypatch, tokens=250)
    steps(mirror, 3)
    before = mirror.cache.packed_tokens()
    steps(mirror, 3, size=3e3)
    assert mirror.cache.packed_tokens() != before
    mirror.cache._stepping.stepper._told.zero_()  # it is on its way
    for change in (
        mirror.cache.nbytes,
        lambda: mirror.cache.remove(1),
        lambda: mirror.cache.select([0, 0]),
        lambda: mirror.cache.read(0),
        lambda: steps(mirror, 1),
    ):
        with pytest.raises(UnsupportedInput, match="earlier decode step could not be stored: a scale of K or V"):
            change()
    mirror.cache.reset()
    assert mirror.cache.length == 0 and mirror.cache.nbytes()["packed"] == 0


def test_a_step_is_described_anew_when_what_it_is_given_is_another(monkeypatch):
    mirror = prompt(method("oscar"), "cuda", monkeypatch, tokens=250)
    layer = with_room(mirror, 1)
    kept, anew = cuda.stepper(copy.deepcopy(layer)), cuda.stepper(copy.deepcopy(layer))
    sinks, others = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)

    def plain(x: Tensor) -> Tensor:
        return x.clone()

    def apart(x: Tensor) -> Tensor:
        return torch.cat((x, x + 9), dim=2)[:, :, :1]

    def unaligned(x: Tensor) -> Tensor:
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    cases = ((sinks, plain), (sinks, plain), (others, plain), (None, apart), (None, plain), (None, unaligned))
    for number, (given, way) in enumerate(cases):
        if number == 1:
            sinks.mul_(-3), others.add_(5)
        q, (k, v) = torch.ones(2, 4, 1, 32), mirror.fresh(1)
        anew._alike = []
        outs = [
            step(way(q), way(k), way(v), due=[0, 0], scale=None, window=None, softcap=None, sinks=given)
            for step in (kept, anew)
        ]
        assert torch.equal(*outs), number
        assert kept._arguments.k.aligned == anew._arguments.k.aligned == (way is not unaligned)


def test_steppers_count_apart_and_keep_what_was_captured(monkeypatch):
    mirror = prompt(method("oscar"), "cuda", monkeypatch, tokens=250)
    first, second = (cuda.stepper(with_room(mirror, 1)) for _ in range(2))
    given = {"due": [0, 0], "window": None, "softcap": None, "sinks": None}
    k, v = mirror.fresh(1)
    for one in (first, second):
        with monkeypatch.context() as patch:
            patch.setattr(launching, "capturing", lambda device: True)
            one(torch.ones(2, 4, 1, 32), k, v, scale=None, **given)
    assert first._attend.arguments.counters != second._attend.arguments.counters
    memory = [weakref.ref(x) for x in first._attend.keep]
    first(torch.ones(2, 4, 1, 32), k, v, scale=1.0, **given)
    gc.collect()
    assert memory and all(x() is not None for x in memory), "a graph writes there"
