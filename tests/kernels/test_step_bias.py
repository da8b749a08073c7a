"""Whole decode steps with a key bias or biased pins: the bytes and the outputs of the long way."""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from attention_truth import relative_error
from cache_mirror import Mirror, assert_same_contents, contents, left_padded
from occamkv.errors import UnsupportedInput
from occamkv.kernels import cpu
from occamkv.kernels.cpu.step import LayerStep
from occamkv.methods import method
from occamkv.methods.crossing import Statistics
from occamkv.ops import rotate
from occamkv.ops.rope import KeyBias
from some_attention import cpu_backends
from some_key_bias import bias_in, some_bias

FORMS = {
    "block": method("oscar", key_bias="remove"),
    "rolling with pins": method("occam"),
    "no rotation": method("kivi", key_bias="remove"),
}
PROMPT, PADS, STEPS = 300, (0, 70), 140
HEADS, QUERY_HEADS, HEAD_DIM = 2, 6, 32
LEANING = torch.tensor([0.0, 1.0, -1.0, 3.0, 0.5, -4.0])

pytestmark = pytest.mark.skipif(
    cpu.refuses(FORMS["block"].packed_format, torch.device("cpu")) is not None, reason="no native library"
)


def decoded(form, monkeypatch, *, key_bias: KeyBias | None = None, leaning: torch.Tensor | None = None, step=LayerStep):
    """A prompt with pads on the left of its second row, then single tokens; outputs, and what is held.

    K holds the bias. `step`: Takes whole steps; None: every step goes the long way.
    """
    taken, generator, outs = [], torch.Generator().manual_seed(3), []

    def stepper(layer):
        made = None if step is None else step(layer)
        return made and mock.Mock(wraps=made, side_effect=lambda *_, **__: taken.append(1) or mock.DEFAULT)

    def put(count: int, kept: torch.Tensor | None):
        k, v = mirror.fresh(count)
        at = (mirror.real.shape[1] + torch.arange(count) - torch.tensor(PADS)[:, None]).clamp_min(-1)
        return mirror.put(k if key_bias is None else k + key_bias.rows(at), v, kept)

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "stepper", stepper)
        mirror = Mirror(form, batch=2, heads=HEADS, head_dim=HEAD_DIM, pin_bias=leaning)
        mirror.cache.statistics = replace(mirror.cache.statistics or Statistics(), key_bias=key_bias)
        seen = put(PROMPT, left_padded(PROMPT, *PADS))
        mirror.cache.attend(torch.randn(2, QUERY_HEADS, PROMPT, HEAD_DIM, generator=generator), seen=seen)
        for _ in range(STEPS):
            seen = put(1, None)
            q = torch.randn(2, QUERY_HEADS, 1, HEAD_DIM, generator=generator)
            outs.append(mirror.cache.attend(q, seen=seen))
    assert len(taken) == (0 if step is None else STEPS)
    return torch.cat(outs, dim=2), mirror.cache


@cpu_backends
@pytest.mark.parametrize(("name", "size"), [("block", 600.0), ("rolling with pins", 3.0), ("no rotation", 600.0)])
def test_whole_steps_with_a_key_bias_leave_the_bytes_of_the_long_way(backend, name, size, monkeypatch):
    key_bias = some_bias(HEADS, HEAD_DIM, 5, size=size)
    fast, whole = decoded(FORMS[name], monkeypatch, key_bias=key_bias)
    slow, long = decoded(FORMS[name], monkeypatch, key_bias=key_bias, step=None)
    assert whole.packed_tokens() == long.packed_tokens() and min(whole.packed_tokens()) > 200
    for row in range(2):
        assert_same_contents(contents(whole, row), contents(long, row))
    assert relative_error(fast, slow.double()) < 1e-5
    other, _ = decoded(
        FORMS[name], monkeypatch, key_bias=key_bias, step=lambda layer: LayerStep(replace(layer, key_bias=None))
    )
    assert relative_error(other, slow.double()) > 0.05, "a twin: without the bias it is another attention"


@cpu_backends
def test_whole_steps_with_biased_pins_are_the_long_way(backend, monkeypatch):
    form = FORMS["rolling with pins"]
    fast, whole = decoded(form, monkeypatch, leaning=LEANING)
    slow, long = decoded(form, monkeypatch, leaning=LEANING, step=None)
    for row in range(2):
        assert_same_contents(contents(whole, row), contents(long, row))
    assert relative_error(fast, slow.double()) < 1e-5
    plain, _ = decoded(form, monkeypatch)
    assert torch.equal(plain[:, :1], fast[:, :1]), "its bias is 0"
    assert all(relative_error(plain[:, h : h + 1], fast[:, h : h + 1].double()) > 1e-3 for h in range(1, QUERY_HEADS))


@pytest.fixture
def layer(monkeypatch):
    """What a step knows of a layer of one sequence in bfloat16: 128 packed tokens and 73 of the residual."""
    layers = []
    monkeypatch.setattr(cpu, "stepper", lambda given: layers.append(given) or LayerStep(given))
    mirror = Mirror(FORMS["block"], heads=HEADS, head_dim=HEAD_DIM, dtype=torch.bfloat16)
    for count in (200, 1):
        seen = mirror.put(*mirror.fresh(count))
        mirror.cache.attend(torch.randn(1, QUERY_HEADS, count, HEAD_DIM), seen=seen)
    (described,) = layers
    return replace(described, packed=[128], residual=[73])


run = partial(dict, due=[0], scale=None, window=None, softcap=None, sinks=None)


@cpu_backends
@pytest.mark.parametrize("pair", [0, 7, 15], ids=["high", "middle", "low"])
def test_the_new_token_lies_in_the_ring_without_its_bias(backend, layer, pair):
    key_bias = bias_in(torch.tensor([pair]), HEADS, HEAD_DIM, size=600.0)
    bare = torch.randn(1, HEADS, 1, HEAD_DIM)
    at = torch.tensor([[201]])
    k = (bare + key_bias.rows(at)).bfloat16()
    LayerStep(replace(layer, key_bias=key_bias))(torch.randn(1, QUERY_HEADS, 1, HEAD_DIM), k, k, **run())
    stored = rotate(k.float() - key_bias.rows(at), hadamard_block=layer.hadamard_block).bfloat16()
    assert torch.equal(layer.ring[0][:, :, 201 % layer.ring[0].shape[2]], stored[:, :, 0])


def test_tables_grow_with_the_steps(layer):
    key_bias = some_bias(HEADS, HEAD_DIM, 3, size=2.0)
    far = replace(layer, first_position=[100_000], key_bias=key_bias)
    k, q = torch.randn(1, HEADS, 1, HEAD_DIM), torch.randn(1, QUERY_HEADS, 1, HEAD_DIM)
    step = LayerStep(replace(far, packed=[0], residual=[0], tables=[[0]]))
    reaches = []
    for _ in range(far.ring[0].shape[2] - 1):
        step(q, k, k, **run())
        reaches.append(step._call.attend.key_bias.contents.reach)
    assert reaches[0] == 100_096 and set(reaches[100:]) == {200_192}, (
        "the first table is of whole pages, the next twice it"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"key_bias": some_bias(3, HEAD_DIM, 2, size=1.0)}, "vector of key_bias", id="key bias"),
        pytest.param({"leaning": torch.zeros(2)}, "logit_bias has 2 values", id="bias of pins"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_before_anything_is_written(layer, change, told):
    before = layer.ring[0].clone()
    pins = replace(layer.pins, logit_bias=change.get("leaning"))
    k, q = torch.randn(1, HEADS, 1, HEAD_DIM), torch.randn(1, QUERY_HEADS, 1, HEAD_DIM)
    with pytest.raises(UnsupportedInput, match=told):
        LayerStep(replace(layer, key_bias=change.get("key_bias"), pins=pins))(q, k, k, **run())
    assert torch.equal(layer.ring[0], before)
