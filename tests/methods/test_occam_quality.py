"""`occam_quality`: occam with error feedback on K and pins found by their norms; the bytes are read as occam's are."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv import method
from occamkv.errors import UnsupportedInput
from paper_formulas import some_kv


def test_it_is_occam_with_feedback_and_found_pins():
    quality = method("occam_quality")
    assert (quality.feedback, quality.pins) == (True, "first:4+found")
    assert dataclasses.replace(quality, name="occam", feedback=False, pins="first:4") == method("occam")
    assert quality.finds_pins
    assert quality.needs_model
    assert quality.pinned_tokens == 4


def moment_of(q: Tensor) -> Tensor:
    flat = q.transpose(0, 1).flatten(1, 2).double()
    return (flat.mT @ flat / flat.shape[1]).float()


def narrow_queries(heads: int, head_dim: int) -> Tensor:
    """Queries that lie mostly in a few directions, `[1, H, T, D]`."""
    generator = np.random.default_rng(3)
    mix = generator.standard_normal((heads, head_dim, head_dim)) * np.exp(-0.1 * np.arange(head_dim))
    return torch.from_numpy((generator.standard_normal((1, heads, 300, head_dim)) @ mix.swapaxes(1, 2)).astype("f4"))


def logit_error(name: str, k: Tensor, v: Tensor, q: Tensor, **statistics: Tensor) -> tuple[float, Tensor]:
    made = method(name)
    stored_k, stored_v = made.decode(made.encode(k, v, **statistics))
    return float((q.double() @ (stored_k - k).double().mT).square().mean()), stored_v


@pytest.mark.parametrize("head_dim", [64, 80], ids=lambda d: f"head_dim {d}")
def test_logits_lose_less_than_with_occam_and_values_are_the_same(head_dim):
    k, v = some_kv(2, head_dim, tokens=256)
    q = narrow_queries(2, head_dim)
    d = torch.ones(2, head_dim)
    occam, values = logit_error("occam", k, v, q, balance=d)
    quality, same_values = logit_error("occam_quality", k, v, q, balance=d, moment=moment_of(q))
    assert 1.5 * quality < occam
    assert torch.equal(values, same_values)


def test_twin_the_moment_of_other_queries_does_not_help():
    k, v = some_kv(2, 64, tokens=256)
    q = narrow_queries(2, 64)
    d = torch.ones(2, 64)
    occam, _ = logit_error("occam", k, v, q, balance=d)
    wrong, _ = logit_error("occam_quality", k, v, q, balance=d, moment=moment_of(q.flip(-1)))
    assert wrong > 0.9 * occam


def test_queries_without_preference_leave_occams_bytes():
    k, v = some_kv(2, 64)
    d = torch.ones(2, 64)
    quality = method("occam_quality").encode(k, v, balance=d, moment=torch.eye(64).expand(2, -1, -1))
    occam = method("occam").encode(k, v, balance=d)
    differing = (quality.pages.records != occam.pages.records).float().mean()
    assert differing < 1e-3
    assert torch.equal(quality.pages.norms, occam.pages.norms)
    assert quality.nbytes == occam.nbytes


def test_without_a_moment_it_says_what_to_do():
    with pytest.raises(UnsupportedInput, match=r"needs the second moment of the queries.*Pass the model"):
        method("occam_quality").encode(*some_kv(2, 64), balance=torch.ones(2, 64))
