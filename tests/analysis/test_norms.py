"""Token Norm Imbalance against loops in float64 and against the paper's formulas."""

import pytest
import torch

from occamkv.analysis import norms
from occamkv.methods import method

HEADS, TOKENS, DIM = 3, 128, 32


def some_keys(*, seed: int = 0) -> torch.Tensor:
    """Uniform keys whose tokens have unequal lengths, `[H, T, D]`."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.rand(HEADS, TOKENS, DIM, generator=generator) - 0.5
    return k * torch.linspace(0.2, 2.0, TOKENS)[torch.randperm(TOKENS, generator=generator)][:, None]


def median(values: list[float]) -> float:
    """The lower one of the two in the middle, as torch takes it."""
    return sorted(values)[(len(values) - 1) // 2]


def test_norms_over_all_heads_and_of_each_head_are_relative_to_their_median():
    k = some_keys().double()
    per_head = [[float(sum(x * x for x in k[h, t].tolist())) ** 0.5 for t in range(TOKENS)] for h in range(HEADS)]
    whole = [sum(per_head[h][t] ** 2 for h in range(HEADS)) ** 0.5 for t in range(TOKENS)]
    assert norms.layer_norms(k).tolist() == pytest.approx([x / median(whole) for x in whole], rel=1e-5)
    for head, row in enumerate(norms.head_norms(k)):
        assert row.tolist() == pytest.approx([x / median(per_head[head]) for x in per_head[head]], rel=1e-5)


def test_scaling_by_the_token_norm_leaves_one_head_flat_and_several_uneven():
    k = some_keys()
    assert norms.scaled_norms(k[:1]).tolist() == pytest.approx([1.0] * TOKENS, rel=1e-5)
    uneven = k.clone()
    uneven[0, 5] *= 10
    assert norms.scaled_norms(uneven)[5] != pytest.approx(1.0, abs=0.1)


def test_group_ratios_are_those_of_whole_groups():
    ratios = norms.group_ratios(torch.tensor([2.0, 1.0, *[1.0] * 30, *[3.0] * 31, 12.0, 100.0]))
    assert ratios.tolist() == [2.0, 4.0]


def test_the_bound_is_the_papers_formula():
    k = some_keys()
    bound = norms.error_bound(k, bits=2)
    assert bound.shape == (HEADS, TOKENS // 32)
    for head in range(HEADS):
        for group in range(TOKENS // 32):
            lengths = k[head, 32 * group : 32 * (group + 1)].double().norm(dim=-1)
            expected = (lengths.max() - lengths.min()) ** 2 / (12 * (2**2 - 1) ** 2)
            assert float(bound[head, group]) == pytest.approx(float(expected), rel=1e-5)


def test_the_measured_error_is_that_of_kivi_and_never_below_the_bound():
    k = some_keys()
    kivi = method("kivi")
    stored, _ = kivi.decode(kivi.encode(k[None], k[None]))
    expected = (k - stored[0]).square().sum(-1).unflatten(1, (-1, 32)).mean(-1)
    measured = norms.measured_error(k, bits=2)
    assert torch.allclose(measured, expected, rtol=0.02)
    assert (measured >= norms.error_bound(k, bits=2)).all()


def test_the_bound_grows_with_imbalance_and_falls_with_bits():
    k = some_keys()
    unequal = k.clone()
    unequal[:, 0] *= 20
    assert (norms.error_bound(unequal, bits=2)[:, 0] > 10 * norms.error_bound(k, bits=2)[:, 0]).all()
    assert torch.allclose(norms.error_bound(k, bits=4) * 25, norms.error_bound(k, bits=2))  # (15 / 3)^2


def test_the_key_that_points_away_from_the_mean_has_the_lowest_cosine():
    k = some_keys() * 0.1 + torch.eye(DIM)[0]
    k[:, 7] = -torch.eye(DIM)[0]
    cosine = norms.key_cosine(k)
    assert int(cosine.argmin()) == 7
    assert float(cosine[7]) == pytest.approx(-1, abs=0.05)
    assert float(cosine.median()) > 0.9
