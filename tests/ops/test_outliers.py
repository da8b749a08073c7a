"""Planted sinks and their kin are found by each of the three rules, ordinary tokens are not, and zeros do no harm."""

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv.ops.outliers import BLOCK_TOKENS, lowest, outliers


def gaussian(tokens: int, *, heads: int = 2, head_dim: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K and V `[H, T, D]`."""
    noise = np.random.default_rng(seed).standard_normal((2, heads, tokens, head_dim)).astype("f4")
    return torch.from_numpy(noise[0]), torch.from_numpy(noise[1])


def by_definition(k: Tensor, v: Tensor) -> np.ndarray:
    """Factor by which each token breaks a limit, 0 for none; float64, block by block."""
    out = []
    for start in range(0, k.shape[1], 32):
        block = slice(start, start + 32)
        k_norm, v_norm = (np.sqrt((x[:, block].double().numpy() ** 2).sum((0, 2))) for x in (k, v))
        k_norm, v_norm = (n / np.sort(n)[15] for n in (k_norm, v_norm))  # torch's median is the lower of the two
        factors = np.maximum(np.maximum(0.4 / v_norm, 0.5 / k_norm), k_norm / 1.6)
        out.append(np.where(factors > 1, factors, 0))
    return np.concatenate(out)


RULES = {
    "a short value": (lambda k, v: (k, v * 0.3), 0.4 / 0.3),
    "a short key": (lambda k, v: (k * 0.3, v), 0.5 / 0.3),
    "a long key": (lambda k, v: (k * 2.4, v), 2.4 / 1.6),
    "a sink: short value and short key": (lambda k, v: (k * 0.1, v * 0.1), 5.0),
}
WITHIN_LIMITS = {
    "a value of half the length": lambda k, v: (k, v * 0.55),
    "a long value": lambda k, v: (k, v * 9.0),
    "a key a little short": lambda k, v: (k * 0.65, v),
    "a key a little long": lambda k, v: (k * 1.3, v),
}


def planted(k: Tensor, v: Tensor, change, at: list[int]) -> tuple[Tensor, Tensor]:
    k, v = k.clone(), v.clone()
    k[:, at], v[:, at] = change(k[:, at], v[:, at])
    return k, v


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_token_is_found_and_no_other(rule):
    change, factor = RULES[rule]
    at = [0, 31, 70, 127]
    factors = outliers(*planted(*gaussian(128), change, at))
    assert factors.shape == (128,)
    assert factors.dtype == torch.float32
    assert factors.nonzero().flatten().tolist() == at
    assert factors[at].numpy() == pytest.approx(factor, rel=0.3)


@pytest.mark.parametrize("what", WITHIN_LIMITS)
def test_twin_a_token_within_the_limits_is_not_found(what):
    assert not outliers(*planted(*gaussian(128), WITHIN_LIMITS[what], [0, 31, 70, 127])).any()


def test_of_ordinary_tokens_hardly_one_is_found():
    for heads, head_dim in ((1, 64), (2, 64), (8, 128)):
        factors = outliers(*gaussian(32 * 400, heads=heads, head_dim=head_dim))
        assert (factors > 0).float().mean() < 1e-4


def test_twin_tokens_of_very_unequal_length_are_found_often():
    k, v = gaussian(32 * 40)
    length = torch.from_numpy(np.exp(np.random.default_rng(1).standard_normal((32 * 40, 1))).astype("f4"))
    assert (outliers(k * length, v) > 0).float().mean() > 0.2


@pytest.mark.parametrize("seed", range(5), ids=lambda s: f"seed {s}")
def test_factors_are_those_of_the_definition(seed):
    k, v = gaussian(160, seed=seed)
    lengths = np.exp(0.6 * np.random.default_rng(seed + 50).standard_normal((2, 160, 1))).astype("f4")
    k, v = k * torch.from_numpy(lengths[0]), v * torch.from_numpy(lengths[1])
    expected = by_definition(k, v)
    assert 0 < (expected > 0).mean() < 1
    assert outliers(k, v).numpy() == pytest.approx(expected, rel=1e-5)


def test_a_block_is_judged_by_itself_and_its_units_do_not_matter():
    assert BLOCK_TOKENS == 32
    k, v = planted(*gaussian(96), RULES["a long key"][0], [40])
    together = outliers(k, v)
    for start in (0, 32, 64):
        block = slice(start, start + 32)
        assert torch.equal(outliers(k[:, block], v[:, block]), together[block])
    scaled = outliers(k * torch.tensor([1e-3, 1.0, 1e3]).repeat_interleave(32)[:, None], v * 1e4)
    assert torch.allclose(scaled, together, rtol=1e-5)


def test_the_norms_are_those_over_all_heads():
    k, v = gaussian(32, heads=4)
    k[1, 9] *= 0.01  # one head of four: three quarters of the square are left
    assert not outliers(k, v).any()
    k[:, 9] *= 0.01
    assert outliers(k, v).nonzero().flatten().tolist() == [9]


def test_zeros_do_no_harm():
    k, v = gaussian(64)
    k[:, 5] = v[:, 5] = 0
    factors = outliers(k, v)
    assert factors.isfinite().all()
    assert factors.nonzero().flatten().tolist() == [5]
    for x in (torch.zeros(2, 64, 8), torch.full((2, 64, 8), 1e-30)):
        assert outliers(x, x).isfinite().all()
    assert outliers(k[:, :0], v[:, :0]).shape == (0,)


def test_lowest_names_the_tokens_with_the_shortest_keys_in_order():
    k, _ = gaussian(128)
    k[:, [90, 3, 64]] *= torch.tensor([0.01, 0.02, 0.03])[:, None]
    assert lowest(k, 3) == [3, 64, 90]
    assert lowest(k, 1) == [90]
    assert lowest(k, 0) == []
    norms = np.sqrt((k.double().numpy() ** 2).sum((0, 2)))
    assert lowest(k, 40) == sorted(np.argsort(norms)[:40].tolist())
    assert lowest(k, 200) == list(range(128))


def test_of_tokens_of_equal_length_lowest_takes_the_first():
    assert lowest(torch.ones(1, 32, 8), 5) == [0, 1, 2, 3, 4]
