"""The balanced rotation: the vector is the best of all, and real quantization errors fall as the formula says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occamkv.ops import apply_grid, dequantize, group_range, quantize, rotate, rotate_back, round_metadata
from occamkv.ops.balance import balance_vector, query_moment, variance_in_groups


def cost(energy: Tensor, variance: Tensor, d: Tensor) -> Tensor:
    """Expected squared error of a logit behind H(d k), up to a factor of bits: sum(d^2 v) sum(u / d^2) / D, `[H]`."""
    energy, variance, d = energy.double(), variance.double(), d.double()
    return (d**2 * variance).sum(-1) * (energy / d**2).sum(-1) / d.shape[-1]


def cost_without_rotation(energy: Tensor, variance: Tensor) -> Tensor:
    """The same where each channel keeps its own error: sum(u v)."""
    return (energy.double() * variance.double()).sum(-1)


def lognormal(heads: int, head_dim: int, *, seed: int, spread: float, tied: bool = True) -> Tensor:
    """Positive numbers `[H, D]`; `tied`: channels c and c + D/2 have one."""
    width = head_dim // 2 if tied else head_dim
    x = np.exp(spread * np.random.default_rng(seed).standard_normal((heads, width)))
    return torch.from_numpy(x.astype("f4")).repeat(1, 2 if tied else 1)


head_dims = st.integers(1, 32).map(lambda n: 8 * n)
seeds = st.integers(0, 10_000)
spreads = st.floats(0, 3)


@given(head_dims, seeds, spreads, spreads)
@settings(deadline=None, max_examples=60)
def test_the_cost_is_never_above_a_plain_hadamard_nor_no_rotation(head_dim, seed, of_queries, of_keys):
    energy = lognormal(2, head_dim, seed=seed, spread=of_queries)
    variance = lognormal(2, head_dim, seed=seed + 1, spread=of_keys)
    balanced = cost(energy, variance, balance_vector(energy, variance))
    plain = cost(energy, variance, torch.ones(2, head_dim))
    floor = 3e-6 * plain  # dead channels are lifted by a millionth of the mean
    assert (balanced <= plain + floor).all()
    assert (balanced <= cost_without_rotation(energy, variance) + floor).all()


def test_twin_each_of_the_two_others_can_cost_more_and_the_other_way_round_costs_most():
    energy = lognormal(1, 64, seed=1, spread=1.0)
    plain = torch.ones(1, 64)
    for variance, dearer in ((1 / energy, "plain"), (energy, "none")):
        d = balance_vector(energy, variance)
        costs = {"plain": cost(energy, variance, plain), "none": cost_without_rotation(energy, variance)}
        assert costs[dearer] > 1.5 * cost(energy, variance, d)
    variance = lognormal(1, 64, seed=2, spread=1.0)
    d = balance_vector(energy, variance)
    assert cost(energy, variance, 1 / d) > 1.5 * cost(energy, variance, plain) > 1.5 * cost(energy, variance, d)


@given(head_dims, seeds)
@settings(deadline=None, max_examples=30)
def test_no_other_vector_costs_less(head_dim, seed):
    energy, variance = (lognormal(1, head_dim, seed=seed + i, spread=1.2) for i in range(2))
    d = balance_vector(energy, variance)
    best = cost(energy, variance, d)
    assert best.item() == pytest.approx(float((energy * variance).double().sqrt().sum() ** 2 / head_dim), rel=1e-5)
    generator = np.random.default_rng(seed)
    for size in (0.001, 0.03, 1.0):
        noise = torch.from_numpy(np.exp(size * generator.standard_normal((40, head_dim))))
        assert (cost(energy, variance, d.double() * noise) >= best * (1 - 1e-6)).all()


def test_on_a_grid_of_vectors_of_two_pairs_the_best_is_ours():
    energy, variance = torch.tensor([[3.0, 0.2, 3.0, 0.2]]), torch.tensor([[0.5, 7.0, 0.5, 7.0]])
    ratios = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    grid = torch.stack((ratios, torch.ones_like(ratios)), dim=1).repeat(1, 2)
    d = balance_vector(energy, variance)[0].double()
    best = ratios[cost(energy, variance, grid).argmin()]
    assert d[0] / d[1] == pytest.approx(float(best), rel=0.002)


def test_the_vector_has_geometric_mean_one_per_head_and_the_formula_as_its_ratio():
    energy, variance = (lognormal(3, 64, seed=i, spread=1.0) for i in range(2))
    d = balance_vector(energy, variance)
    assert d.shape == (3, 64)
    assert d.dtype == torch.float32
    assert d.double().log().mean(-1).abs().max() < 1e-6
    ratio = d.double() / (energy.double() / variance.double()).pow(0.25)
    assert (ratio / ratio[:, :1] - 1).abs().max() < 1e-4


@given(head_dims, seeds)
@settings(deadline=None, max_examples=30)
def test_the_two_channels_of_a_rope_pair_have_one_value_so_turning_the_pair_commutes(head_dim, seed):
    energy, variance = (lognormal(2, head_dim, seed=seed + i, spread=1.5, tied=False) for i in range(2))
    d = balance_vector(energy, variance)
    assert torch.equal(d[:, : head_dim // 2], d[:, head_dim // 2 :])
    generator = np.random.default_rng(seed)
    k, angle = (torch.from_numpy(generator.standard_normal(size)) for size in ((2, head_dim), (1, head_dim // 2)))

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    assert (turned(d * k) - d * turned(k)).abs().max() < 1e-12
    twin = d * torch.cat((torch.full((head_dim // 2,), 2.0), torch.ones(head_dim // 2)))
    assert (turned(twin * k) - twin * turned(k)).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [(1e6, 1.0), (1.0, 1e-6), (1e-9, 1e9)], ids=str)
def test_the_units_of_queries_and_keys_do_not_matter(scale):
    energy, variance = (lognormal(2, 64, seed=i, spread=1.0) for i in range(2))
    d = balance_vector(energy, variance)
    assert (balance_vector(energy * scale[0], variance * scale[1]) / d - 1).abs().max() < 1e-5


DEAD = {
    "channels of K that never change": lambda u, v: (u, v.index_fill(1, torch.tensor([3, 35]), 0.0)),
    "channels that no query looks at": lambda u, v: (u.index_fill(1, torch.tensor([3, 35]), 0.0), v),
    "both": lambda u, v: tuple(t.index_fill(1, torch.tensor([3, 35]), 0.0) for t in (u, v)),
    "a head whose keys never change": lambda u, v: (u, v * torch.tensor([[0.0], [1.0]])),
    "a head without queries": lambda u, v: (u * torch.tensor([[0.0], [1.0]]), v),
    "nothing at all": lambda u, v: (u * 0, v * 0),
    "tiny numbers": lambda u, v: (u * 1e-30, v * 1e-30),
}


@pytest.mark.parametrize("what", DEAD)
def test_dead_channels_give_a_finite_positive_vector(what):
    energy, variance = DEAD[what](*(lognormal(2, 64, seed=i, spread=1.0) for i in range(2)))
    d = balance_vector(energy, variance)
    assert d.isfinite().all()
    assert (d > 0).all()
    assert d.max() / d.min() < 1e4
    if what == "nothing at all":
        assert torch.allclose(d, torch.ones(2, 64))


def test_variance_in_groups_is_that_of_whole_groups_of_32_tokens():
    k = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 100, 16)).astype("f4"))
    k += torch.arange(100)[:, None] // 32 * 10.0  # differences between groups do not count
    groups = k.double().numpy()[:, :, :96].reshape(2, 3, 3, 32, 16)
    expected = groups.var(axis=3, ddof=1).mean(axis=(0, 2))
    assert variance_in_groups(k).double().numpy() == pytest.approx(expected, rel=1e-5)
    assert variance_in_groups(k[:, :, :5]).double().numpy() == pytest.approx(
        k[:, :, :5].double().numpy().var(axis=2, ddof=1).mean(0), rel=1e-5
    )
    assert variance_in_groups(k.to(torch.bfloat16)).dtype == torch.float32


def test_the_moment_of_queries_is_that_of_the_heads_that_read_a_kv_head():
    q = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 6, 7, 8)).astype("f4"))
    moment = query_moment(q, kv_heads=2)
    for head in range(2):
        rows = q[:, 3 * head : 3 * head + 3].double().reshape(-1, 8)
        assert torch.allclose(moment[head].double(), rows.T @ rows / len(rows), atol=1e-6)
    assert not torch.allclose(moment[0], query_moment(q.roll(1, 1), kv_heads=2)[0], atol=1e-2)


def logit_error(k: Tensor, q: Tensor, *, block: int | None, d: Tensor | None, bits: int = 3) -> float:
    """Mean square of what q . k loses when K is quantized per channel in groups of 32 tokens behind H(d k)."""
    groups = rotate(k, hadamard_block=block, balance=d).unflatten(2, (-1, 32))
    low, high = apply_grid(*group_range(groups, axis="channel", group=32), bits=bits, grid="minmax")
    meta = round_metadata(low, high, bits=bits, metadata_bits=32)
    codes = quantize(groups, scale=meta.scale, minimum=meta.minimum, bits=bits)
    stored = dequantize(codes, scale=meta.scale, minimum=meta.minimum).flatten(2, 3)
    error = rotate_back(stored, hadamard_block=block, balance=d) - k
    return float((q.double() @ error.double().mT).square().mean())


def keys_and_queries(*, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys with unequal channels, queries that look hardest where the keys are quiet; their energy and variance."""
    loud = lognormal(1, 64, seed=7, spread=spread)
    noise = np.random.default_rng(8).standard_normal((2, 1, 1, 4096, 64)).astype("f4")
    energy, variance = 1 / loud, loud**2
    k, q = (torch.from_numpy(noise[i]) * scale.sqrt() for i, scale in enumerate((variance, energy)))
    return k, q[:, :, :512], energy, variance


def test_the_error_of_logits_falls_by_the_predicted_factor():
    k, q, energy, variance = keys_and_queries(spread=1.0)
    measured = query_moment(q, kv_heads=1).diagonal(dim1=1, dim2=2), variance_in_groups(k)
    d = balance_vector(*measured)
    balanced = logit_error(k, q, block=64, d=d)
    plain, none = (logit_error(k, q, block=block, d=None) for block in (64, None))
    predicted = cost(energy, variance, torch.ones(1, 64)) / cost(energy, variance, d)
    assert predicted > 3
    assert plain / balanced == pytest.approx(predicted.item(), rel=0.1)
    predicted = cost_without_rotation(energy, variance) / cost(energy, variance, d)
    assert predicted > 1.14
    assert none / balanced == pytest.approx(predicted.item(), rel=0.1)
    assert balanced < none
    assert balanced < plain


def test_twin_without_anything_to_balance_nothing_is_gained():
    k, q, *_ = keys_and_queries(spread=0.0)
    plain = logit_error(k, q, block=64, d=None)
    assert logit_error(k, q, block=64, d=torch.ones(1, 64)) == plain
    d = balance_vector(query_moment(q, kv_heads=1).diagonal(dim1=1, dim2=2), variance_in_groups(k))
    assert logit_error(k, q, block=64, d=d) == pytest.approx(plain, rel=0.02)
    wrong = lognormal(1, 64, seed=9, spread=1.0)
    assert logit_error(k, q, block=64, d=wrong) > 1.5 * plain
