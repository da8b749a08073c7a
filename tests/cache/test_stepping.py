"""Whole steps in one call of the backend leave the same bytes as the long way, and read the same."""

import copy
from dataclasses import replace

import pytest
import torch

from cache_mirror import Mirror, assert_same_contents, contents
from occamkv.cache import LayerCache
from occamkv.cache.masks import read_mask
from occamkv.errors import UnsupportedInput
from occamkv.kernels import cpu
from occamkv.kernels.cpu.step import LayerStep
from occamkv.methods import method

FORMS = {
    "block": method("oscar"),
    "rolling with pins and 8-bit metadata": method("occam"),
    "groups of 64": method("occam_small"),
    "error feedback": method("occam_quality", pins="first:4"),
    "found pins": method("occam_quality"),
    "per token, K and V of 3 and 4 bits": method("quarot_k3v4"),
    "no rotation": method("kivi"),
}
STEPS = 200

pytestmark = pytest.mark.skipif(
    cpu.refuses(FORMS["block"].packed_format, torch.device("cpu")) is not None, reason="no native library"
)


@pytest.fixture
def steps(monkeypatch):
    """Counts the whole steps that are taken."""
    taken, call = [], LayerStep.__call__
    monkeypatch.setattr(LayerStep, "__call__", lambda *a, **k: taken.append(1) or call(*a, **k))
    return taken


def decoded(form, monkeypatch, *, whole: bool, dtype=torch.bfloat16, batch=2) -> tuple[list[torch.Tensor], Mirror]:
    """A prompt with pads on the left of its second row, then single tokens; outputs and what is held."""
    with monkeypatch.context() as patch:
        if not whole:
            patch.setattr(cpu, "stepper", lambda layer: None)
        mirror = Mirror(form, batch=batch, dtype=dtype)
        kept = torch.ones(batch, 300, dtype=torch.bool)
        kept[-1, :70] = False
        seen = mirror.put(*mirror.fresh(300), kept)
        heads, head_dim = mirror.shape
        generator = torch.Generator().manual_seed(3)
        q = torch.randn(batch, 2 * heads, 300, head_dim, generator=generator).to(dtype)
        outs = [mirror.cache.attend(q, seen=seen)]
        for _ in range(STEPS):
            seen = mirror.put(*mirror.fresh(1))
            q = torch.randn(batch, 2 * heads, 1, head_dim, generator=generator).to(dtype)
            outs.append(mirror.cache.attend(q, seen=seen))
        return outs[1:], mirror


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_whole_steps_leave_the_bytes_of_the_long_way(name, dtype, steps, monkeypatch):
    fast, whole = decoded(FORMS[name], monkeypatch, whole=True, dtype=dtype)
    assert len(steps) == STEPS if not FORMS[name].finds_pins else STEPS - 20 < len(steps) < STEPS
    slow, long = decoded(FORMS[name], monkeypatch, whole=False, dtype=dtype)
    assert whole.cache.packed_tokens() == long.cache.packed_tokens() and min(whole.cache.packed_tokens()) > 200
    for row in range(2):
        assert_same_contents(contents(whole.cache, row), contents(long.cache, row))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-3)


@pytest.mark.parametrize("change", ["records_past", "pack_after_attend", "a mask", "two tokens", "float64"])
def test_a_step_out_of_the_ordinary_goes_the_long_way(change, steps):
    cache = LayerCache(method("oscar"), pack_after_attend=change != "pack_after_attend")
    dtype = torch.float64 if change == "float64" else torch.float32
    new = 2 if change == "two tokens" else 1
    k = torch.randn(1, 2, 200, 32, dtype=dtype)
    cache.update(k, k)
    cache.attend(torch.randn(1, 2, 200, 32, dtype=dtype))
    cache.records_past = change == "records_past"
    cache.update(k[:, :, :new], k[:, :, :new])
    mask = torch.ones(1, 1, 1, 200 + new, dtype=torch.bool)
    mask[..., 5] = False
    seen = None
    if change == "a mask":
        seen = read_mask(mask, before=None, new=1, batch=1)
    cache.attend(torch.randn(1, 2, new, 32, dtype=dtype), seen=seen)
    assert not steps


@pytest.mark.parametrize(
    ("q", "sinks"),
    [
        pytest.param((1, 3, 1, 32), None, id="query heads no multiple of KV heads"),
        pytest.param((2, 2, 1, 32), None, id="another batch"),
        pytest.param((1, 2, 1, 64), None, id="another head_dim"),
        pytest.param((1, 2, 1, 32), 3, id="too many sinks"),
    ],
)
def test_queries_that_do_not_fit_are_refused_before_a_step_is_taken(q, sinks, steps):
    cache = LayerCache(method("oscar"))
    k = torch.randn(1, 2, 200, 32)
    cache.update(k, k)
    cache.settle()
    cache.update(k[:, :, :1], k[:, :, :1])
    with pytest.raises(UnsupportedInput):
        cache.attend(torch.randn(q), sinks=None if sinks is None else torch.zeros(sinks))
    assert not steps
    cache.attend(torch.randn(1, 2, 1, 32))
    assert steps == [1] and cache.length == 201


def test_other_query_heads_in_the_same_memory_order_are_described_anew(steps):
    cache = LayerCache(method("oscar"))
    k, wide = torch.randn(1, 2, 200, 32), torch.randn(1, 8, 1, 32)
    cache.update(k, k)
    cache.settle()
    for heads in (2, 8, 4):
        cache.update(k[:, :, :1], k[:, :, :1])
        other = copy.deepcopy(cache)
        q = wide[:, :heads]  # the strides are those of all eight
        torch.testing.assert_close(cache.attend(q), other.attend(q.clone()), rtol=0, atol=0)
    assert len(steps) == 6


def test_a_copy_steps_in_memory_of_its_own(steps):
    cache = LayerCache(method("oscar"))
    k, q = torch.randn(1, 2, 200, 32), torch.randn(1, 2, 1, 32)
    cache.update(k, k)
    cache.settle()
    for _ in range(2):
        cache.update(k[:, :, :1], k[:, :, :1])
        cache.attend(q)
    clone = copy.deepcopy(cache)
    before = cache.store.residual_k.clone()
    clone.update(k[:, :, 1:2], k[:, :, 1:2])
    clone.attend(q)
    assert len(steps) == 3 and torch.equal(cache.store.residual_k, before)
    assert (cache.length, clone.length) == (202, 203)


def test_counts_that_do_not_fit_are_refused_before_anything_is_written(monkeypatch):
    cache = LayerCache(method("oscar"))
    k, q = torch.randn(1, 2, 200, 32), torch.randn(1, 2, 1, 32)
    cache.update(k, k)
    cache.settle()
    layers = []
    monkeypatch.setattr(cpu, "stepper", lambda layer: layers.append(layer) or LayerStep(layer))
    cache.update(k[:, :, :1], k[:, :, :1])
    cache.attend(q)
    (layer,) = layers
    for wrong in ({"residual": [128]}, {"residual": [-1]}, {"packed": [-128]}, {"packed": [100000]}):
        step = LayerStep(replace(layer, **wrong))
        before = layer.ring[0].clone()
        with pytest.raises(UnsupportedInput, match=r"do not fit together|whole records"):
            step(q, k[:, :, :1], k[:, :, :1], due=[0], scale=None, window=None, softcap=None, sinks=None)
        assert torch.equal(layer.ring[0], before)
