"""What fixed point costs: at most 1e-3 of the output, and less than torch's own attention in bfloat16 on the same K, V.

The truth is float64 attention on what the packed bytes stand for: the error of quantization is not in these numbers.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from attention_truth import attention, relative_error, torch_attention
from some_attention import ASKS_AND_FINDS, METHODS, Case, Held, backend_or_skip, cpu_backends, make_case

FORMS = {name: METHODS[name] for name in ("oscar", "rtn", "oscar-k4v3-balanced-with-float16-norms")}
FORMS["occam"] = ASKS_AND_FINDS["occam"]
SINK, TOKENS, HEAD_DIM, GQA = 3, 4096, 128, 4
ALLOWED = 1e-3


@cache
def long_case(name: str) -> Case:
    """Pins, 4K packed tokens, a residual, one query."""
    groups = TOKENS // FORMS[name].packed_format.record_tokens
    return make_case(FORMS[name], head_dim=HEAD_DIM, gqa=GQA, queries=1, held=(Held(2, groups, 100),))


def weights(case: Case) -> torch.Tensor:
    """The softmax of the only query, float64 `[1, Hq, 1, N]`."""
    logits = case.q.double() @ case.k.repeat_interleave(GQA, dim=1).mT * HEAD_DIM**-0.5
    return logits.masked_fill(case.positions[:, None, None] < 0, float("-inf")).softmax(-1)


def loudest(case: Case) -> torch.Tensor:
    """For each KV head the packed token with the longest K."""
    return case.k[0, :, :TOKENS].norm(dim=-1).argmax(-1)


def looking_at(case: Case, token: int | torch.Tensor, share: float) -> Case:
    """Queries turned towards a token (of each KV head) until it has this share of the weight, found by halving."""
    heads = torch.arange(case.k.shape[1])
    towards = case.k[:, heads, token, None].repeat_interleave(GQA, dim=1)
    low, high = torch.zeros(case.q.shape[1], 1, 1), torch.full((case.q.shape[1], 1, 1), 10.0)
    for _ in range(16):
        middle = (low + high) / 2
        turned = replace(case, q=(case.q * 0.5 + middle * towards).float())
        enough = weights(turned)[0].amax(-1, keepdim=True) > share
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return turned


LOOKS = {
    "evenly at all": lambda case: replace(case, q=case.q * 0.02),
    "at a few": lambda case: replace(case, q=case.q * 0.5),
    "at a packed sink": lambda case: looking_at(case, SINK, 0.8),
    "at a pinned sink": lambda case: looking_at(case, TOKENS, 0.8),
    "at one packed token and nothing else": lambda case: looking_at(case, loudest(case), 0.999),
}


@cache
def known(name: str, look: str) -> tuple[Case, torch.Tensor, float]:
    """A case, its truth, and the relative error of torch's attention in bfloat16."""
    case = LOOKS[look](long_case(name))
    where = {"q_positions": case.q_positions, "positions": case.positions}
    truth = attention(case.q.double(), case.k, case.v, **where)
    short = torch_attention(*(x.bfloat16() for x in (case.q, case.k, case.v)), **where)
    return case, truth, relative_error(short, truth)


@cpu_backends
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", FORMS)
def test_the_error_is_small_and_below_that_of_bfloat16_attention(backend, name, look):
    case, truth, in_bfloat16 = known(name, look)
    error = relative_error(case.attend(backend_or_skip(backend, FORMS[name])), truth)
    assert error < ALLOWED
    assert error < in_bfloat16 / 3, (error, in_bfloat16)
    assert in_bfloat16 > ALLOWED, "a twin: bfloat16 itself is not within the bound"


@pytest.mark.parametrize(
    ("look", "least", "most"),
    [
        ("evenly at all", 0, 0.001),
        ("at a packed sink", 0.79, 0.81),
        ("at a pinned sink", 0.79, 0.81),
        ("at one packed token and nothing else", 0.998, 1),
    ],
)
def test_twin_the_cases_look_where_they_say(look, least, most):
    largest = weights(known("oscar", look)[0]).amax(-1)
    assert least <= largest.min() <= largest.max() <= most
