"""Sink logits at their ends: plain softmax, the softmax off by one, nothing at all."""

from dataclasses import replace

import pytest
import torch

from attention_truth import relative_error
from some_attention import METHODS, RAGGED, Held, attend_backends, backend_or_skip, make_case

HELD = (*RAGGED, Held(0, 1, 40, pads=1))
every_path = pytest.mark.parametrize("queries", [1, 5, 9])


@attend_backends
@every_path
@pytest.mark.parametrize("name", ["oscar", "quarot"])
def test_sinks_of_minus_infinity_are_plain_softmax_to_the_bit(backend, name, queries):
    case, target = make_case(METHODS[name], queries=queries, held=HELD), backend_or_skip(backend, METHODS[name])
    out = case.attend(target, sinks=torch.full((2,), float("-inf")))
    assert torch.equal(out, case.attend(target)) and out.isfinite().all()


@attend_backends
@every_path
def test_sinks_of_zero_are_the_softmax_off_by_one(backend, queries):
    """`e^x / (1 + sum e^x)` as it is written (Miller 2023, "Attention Is Off By One")."""
    case, target = make_case(METHODS["kivi"], queries=queries, held=HELD), backend_or_skip(backend, METHODS["kivi"])
    small = replace(case, q=case.q * 0.2)  # so that the one counts
    powers = torch.exp(small.q.double() @ case.k.mT * 64**-0.5)
    at, there = case.q_positions[:, None, :, None], case.positions[:, None, None, :]
    powers = powers * ((there >= 0) & (there <= at) & (at >= 0))
    truth = powers / (1 + powers.sum(-1, keepdim=True)) @ case.v
    out = small.attend(target, sinks=torch.zeros(2))
    assert relative_error(out, truth) < 1e-3
    plain = powers / powers.sum(-1, keepdim=True).clamp_min(1e-30) @ case.v
    assert relative_error(plain, truth) > 3e-3, "a twin: the one counts"


@attend_backends
@every_path
@pytest.mark.parametrize("sink", [1e3, 1e9, 1e30, torch.finfo(torch.float32).max])
def test_very_large_sinks_leave_nothing_and_no_nan(backend, sink, queries):
    case, target = make_case(METHODS["oscar"], queries=queries, held=HELD), backend_or_skip(backend, METHODS["oscar"])
    out = case.attend(target, sinks=torch.tensor([sink, 0.0]))
    assert (out[:, 0].abs() < 1e-30).all(), "below the smallest normal float16 by far"
    torch.testing.assert_close(out[:, 1], case.attend(target, sinks=torch.zeros(2))[:, 1], rtol=0, atol=0)
