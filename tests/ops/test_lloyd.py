"""Lloyd-Max levels against published tables, their defining equations, and a brute-force search for the nearest."""

import math

import numpy as np
import pytest
import torch

import slow_decoder
from occamkv.ops.lloyd import levels, nearest_level

every_width = pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")

# J. Max, "Quantizing for minimum distortion", 1960, table I: the upper half of the levels, and the mean squared error.
MAX_1960 = {2: (0.4528, 1.510), 3: (0.2451, 0.7560, 1.344, 2.152)}
MAX_1960_ERROR = {2: 0.1175, 3: 0.03454, 4: 0.009497}


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-float(t) / math.sqrt(2)) for t in x])


def cells(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and conditional mean of a unit normal between the middles of neighbouring points."""
    edges = np.array([-np.inf, *((points[1:] + points[:-1]) / 2), np.inf])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    weight = np.diff(normal_cdf(edges))
    return weight, -np.diff(density) / weight


def assert_is_a_fixed_point(points: np.ndarray) -> None:
    assert np.abs(cells(points)[1] - points).max() < 1e-6


@pytest.mark.parametrize("bits", MAX_1960, ids=lambda b: f"{b} bits")
def test_levels_are_the_published_ones(bits):
    upper = levels(bits)[2 ** (bits - 1) :].numpy()
    assert upper == pytest.approx(MAX_1960[bits], rel=5e-4)


@every_width
def test_levels_are_those_of_newtons_method_to_the_last_bit(bits):
    """Records hold codes only, so a level that moves changes what old bytes mean."""
    assert levels(bits).dtype == torch.float32
    assert np.array_equal(levels(bits).double().numpy(), slow_decoder.LEVELS[bits])


@every_width
def test_levels_are_ascending_symmetric_and_the_means_of_their_cells(bits):
    points = levels(bits).double().numpy()
    assert len(points) == 2**bits
    assert (np.diff(points) > 0).all()
    assert np.array_equal(points, -points[::-1])
    assert_is_a_fixed_point(points)


@every_width
def test_twin_the_equations_see_levels_that_are_off_by_a_thousandth(bits):
    points = levels(bits).double().numpy()
    for wrong in (points * 1.001, np.linspace(points[0], points[-1], len(points)), points + 0.001):
        with pytest.raises(AssertionError):
            assert_is_a_fixed_point(wrong)


@every_width
def test_the_mean_squared_error_is_the_published_one_and_no_other_levels_have_a_smaller(bits):
    def error(points: np.ndarray) -> float:
        weight, mean = cells(points)
        return float(1 - (weight * (2 * mean - points) * points).sum())

    points = levels(bits).double().numpy()
    assert error(points) == pytest.approx(MAX_1960_ERROR[bits], rel=6e-4)
    generator = np.random.default_rng(bits)
    for size in (0.001, 0.01, 0.1):
        moved = np.sort(points + size * generator.standard_normal((50, len(points))), axis=1)
        assert all(error(other) > error(points) for other in moved)


@every_width
def test_the_nearest_level_is_that_of_a_search_through_all(bits):
    generator = np.random.default_rng(bits)
    x = torch.from_numpy(np.concatenate((generator.standard_normal(4000) * 1.5, [1e30, -1e30, 0.0])).astype("f4"))
    distance = np.abs(x.double().numpy()[:, None] - levels(bits).double().numpy())
    codes = nearest_level(x, bits=bits)
    assert codes.dtype == torch.uint8
    chosen = np.take_along_axis(distance, codes.numpy().astype(int)[:, None], 1)[:, 0]
    assert np.abs(chosen - distance.min(1)).max() < 2e-7
    assert (codes[:-3].min(), codes[:-3].max()) == (0, 2**bits - 1)
    assert codes[-3:-1].tolist() == [2**bits - 1, 0]


@every_width
def test_each_level_has_its_own_code_and_strides_do_not_matter(bits):
    assert nearest_level(levels(bits), bits=bits).tolist() == list(range(2**bits))
    x = torch.linspace(-3, 3, 60).reshape(12, 5)
    assert torch.equal(nearest_level(x.T, bits=bits), nearest_level(x, bits=bits).T)


@every_width
def test_on_random_normal_numbers_the_error_is_the_published_one(bits):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(bits))
    error = (levels(bits)[nearest_level(x, bits=bits).long()] - x).square().mean()
    assert float(error) == pytest.approx(MAX_1960_ERROR[bits], rel=0.015)
    even = torch.linspace(-2.5, 2.5, 2**bits)
    assert (even[(x[:, None] - even).abs().argmin(1)] - x).square().mean() > 1.03 * error
