"""A layer cache on the CUDA backend, on a CPU: what a step leaves to the long way, and errors that come late."""

import pytest
import torch
from torch import Tensor

import emulated_cuda
from attention_truth import relative_error
from cache_mirror import Mirror, assert_same_contents, contents
from kernels.test_cuda_stepping import in_native_order, prompt
from occamkv.errors import UnsupportedInput
from occamkv.kernels.cuda import stepping
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
