"""A bias on the logits of a part of the full-precision tokens: against float64 attention with that number added."""

from dataclasses import replace

import pytest
import torch

from attention_truth import attention, relative_error
from occamkv.errors import UnsupportedInput
from some_attention import METHODS, RAGGED, Case, Held, attend_backends, backend_or_skip, make_case

HELD = (*RAGGED, Held(3, 1, 40, pads=1))
BIAS = torch.tensor([0.0, 2.0, -3.0, 1.0, -0.5, 6.0])


def leaning(case: Case, bias: torch.Tensor, part: int = 0) -> Case:
    """The same tokens, with a bias on one part of those in full precision: 0 pins, 1 residual, 2 new ones."""
    full = list(case.full)
    full[part] = replace(full[part], logit_bias=bias)
    return replace(case, full=full)


def additive(case: Case, bias: torch.Tensor, part: int) -> torch.Tensor:
    """The same as a mask over positions, causal, `[B, Hq, Tq, positions]`, float64."""
    count, where = case.mask_positions, case.full[part].positions
    seen = torch.arange(count) <= case.q_positions[:, None, :, None]
    added = torch.zeros(len(where), 1, 1, count + 1).scatter_(-1, where.where(where >= 0, count)[:, None, None], 1.0)
    return (added[..., :count] * bias.double()[:, None, None]).masked_fill(~seen, float("-inf"))


@attend_backends
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("part", [0, 1])
def test_the_bias_is_added_to_logits_after_the_cap(backend, part, queries, softcap):
    case = make_case(METHODS["oscar"], gqa=3, queries=queries, held=HELD)
    out = leaning(case, BIAS, part).attend(backend_or_skip(backend, METHODS["oscar"]), softcap=softcap)
    where = {"q_positions": case.q_positions, "positions": case.positions, "softcap": softcap}
    truth = attention(case.q.double(), case.k, case.v, mask=additive(case, BIAS, part), **where)
    plain = attention(case.q.double(), case.k, case.v, **where)
    assert relative_error(out, truth) < 1e-3 < relative_error(out, plain), "a twin: the bias matters"


@attend_backends
@pytest.mark.parametrize("queries", [1, 9])
def test_no_bias_is_a_bias_of_zero(backend, queries):
    case, target = make_case(METHODS["oscar"], gqa=3, queries=queries), backend_or_skip(backend, METHODS["oscar"])
    assert torch.equal(leaning(case, torch.zeros(6)).attend(target), case.attend(target))


@attend_backends
@pytest.mark.parametrize("queries", [1, 9])
def test_mass_moves_to_the_part_with_its_bias_and_never_back(backend, queries):
    """V is 1 on the pins and 0 elsewhere, so that the output is the share of attention that they get."""
    case, target = make_case(METHODS["kivi"], queries=queries, held=HELD), backend_or_skip(backend, METHODS["kivi"])
    full = [replace(part, v=torch.full_like(part.v, float(i == 0))) for i, part in enumerate(case.full)]
    case = replace(case, packed=None, full=full)
    biases = [float("-inf"), -20.0, -3.0, -1.0, 0.0, 0.5, 2.0, 8.0, 100.0]
    shares = torch.stack([leaning(case, torch.full((2,), b)).attend(target).mean(-1) for b in biases])
    real = case.q_positions[:, None].expand(-1, 2, -1) >= 0
    assert (shares.diff(dim=0)[:, real] >= 0).all()
    assert (shares[2:8].diff(dim=0)[:, real] > 0).all()
    assert (shares[0][real] == 0).all() and torch.allclose(shares[-1][real], torch.ones(()))


@attend_backends
@pytest.mark.parametrize(
    ("bias", "told"),
    [
        pytest.param(torch.zeros(5), "logit_bias has 5 values.* 6 query heads", id="too few heads"),
        pytest.param(torch.zeros(6).long(), "logit_bias is torch.int64", id="whole numbers"),
        pytest.param(torch.zeros(6, device="meta"), "on meta", id="another device"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(backend, bias, told):
    case = make_case(METHODS["oscar"], gqa=3)
    with pytest.raises(UnsupportedInput, match=told):
        leaning(case, bias).attend(backend_or_skip(backend, METHODS["oscar"]))
