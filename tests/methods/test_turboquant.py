"""`turboquant` against its formula with a dense matrix: norm out, signs and Hadamard, the nearest Lloyd-Max level."""

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv import Format, Method, method
from occamkv.methods.crossing import random_signs
from paper_formulas import relative_error, some_kv, sylvester
from slow_decoder import LEVELS

HEAD_DIMS = (8, 64, 80, 96, 112, 128, 256)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda d: f"head_dim {d}")


def test_the_recipe_is_exactly_this():
    assert method("turboquant") == Method(
        name="turboquant",
        format=Format(k_bits=2.5, v_bits=2.5, k_axis="token", k_group=256, v_group=256, levels="lloyd"),
        k_rotation="random",
        v_rotation="random",
        source="Zandieh et al. 2025, arXiv:2504.19874",
    )
    assert not method("turboquant").needs_model


# One 16-bit norm per token and head, and 2.5 bits per value; 80 channels are stored as 96.
BITS = {64: 2.5 + 16 / 64, 128: 2.5 + 16 / 128, 256: 2.5 + 16 / 256, 80: 2.5 * 96 / 80 + 16 / 80}


@pytest.mark.parametrize("head_dim", BITS, ids=lambda d: f"head_dim {d}")
def test_bits_by_hand(head_dim):
    for heads in (1, 8):
        assert method("turboquant").bits_per_value(kv_heads=heads, head_dim=head_dim) == BITS[head_dim]
    wider = method("turboquant_k4v3").bits_per_value(kv_heads=2, head_dim=128)
    assert wider == 3.5 + 16 / 128


def dense_rotation(head_dim: int, signs: Tensor) -> np.ndarray:
    """diag(signs) H as one matrix, for row vectors."""
    block = head_dim & -head_dim
    return np.diag(signs.double().numpy()) @ np.kron(np.eye(head_dim // block), sylvester(block).numpy())


def channel_bits(bits: float, head_dim: int) -> np.ndarray:
    """Bits of each channel: 2.5 are 3 in the first half of the channels as stored, a multiple of 32, and 2 behind."""
    if bits != 2.5:
        return np.full(head_dim, bits, dtype=int)
    return np.where(np.arange(head_dim) < (head_dim + 31) // 32 * 16, 3, 2)


def turboquant_in_float64(x: Tensor, bits: float, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stored values in the rotated space, and which are no rounding tie."""
    inside = x.double().numpy() @ matrix
    head_dim = inside.shape[-1]
    rms = np.sqrt((inside**2).sum(-1, keepdims=True) / head_dim).astype(np.float16).astype(np.float64)
    units, stored, clear = inside / rms, np.empty_like(inside), np.empty(inside.shape, dtype=bool)
    for channel, width in enumerate(channel_bits(bits, head_dim)):
        distance = np.abs(units[..., channel, None] - LEVELS[width])
        nearest, second = np.sort(distance, -1)[..., :2].transpose(-1, *range(distance.ndim - 1))
        stored[..., channel] = LEVELS[width][distance.argmin(-1)]
        clear[..., channel] = second - nearest > 1e-4
    near_a_float16_tie = np.abs(np.frexp(np.sqrt((inside**2).mean(-1, keepdims=True)))[0] * 2**11 % 1 - 0.5) < 1e-3
    return stored * rms, clear & ~near_a_float16_tie


def assert_is_turboquant(x: Tensor, stored: Tensor, bits: float, signs: Tensor) -> None:
    matrix = dense_rotation(x.shape[-1], signs)
    expected, clear = turboquant_in_float64(x, bits, matrix)
    assert clear.mean() > 0.98
    inside = stored.double().numpy() @ matrix
    assert np.abs(inside - expected)[clear].max() < 1e-5 * np.abs(expected).max()


@every_head_dim
@pytest.mark.parametrize("bits", [2, 2.5, 3, 4], ids=lambda b: f"{b} bits")
def test_stored_keys_and_values_are_those_of_the_formula(bits, head_dim):
    given = some_kv(2, head_dim, batch=2)
    made = method("turboquant", k_bits=bits, v_bits=bits)
    for x, stored in zip(given, made.decode(made.encode(*given)), strict=True):
        assert_is_turboquant(x, stored, bits, random_signs(head_dim))


@pytest.mark.parametrize(
    "wrong",
    [{"k_bits": 2}, {"k_bits": 3}, {"k_rotation": "hadamard"}, {"levels": "uniform", "k_bits": 3, "v_bits": 3}],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
def test_twin_the_formula_check_sees_another_recipe(wrong):
    k, v = some_kv(2, 64)
    made = method("turboquant", **wrong)
    stored = made.decode(made.encode(k, v))[0]
    with pytest.raises(AssertionError):
        assert_is_turboquant(k, stored, 2.5, random_signs(64))


def test_twin_the_formula_check_sees_other_signs():
    k, v = some_kv(2, 64)
    made = method("turboquant")
    stored = made.decode(made.encode(k, v))[0]
    with pytest.raises(AssertionError):
        assert_is_turboquant(k, stored, 2.5, -random_signs(64).flip(0))


def test_the_length_of_a_token_does_not_matter_and_nor_does_that_of_others():
    k, v = some_kv(2, 64)
    made = method("turboquant")
    plain, doubled = (made.decode(made.encode(x, v))[0] for x in (k, k * 2))
    assert torch.equal(doubled, plain * 2)
    k[:, :, 7] = 1000.0
    others = made.decode(made.encode(k, v))[0]
    kept = torch.arange(128) != 7
    assert torch.equal(others[:, :, kept], plain[:, :, kept])


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (2.5, 0.0760), (3, 0.03454), (4, 0.009497)])
def test_the_error_is_the_published_one_even_with_loud_channels(bits, error):
    """Max 1960, and for 2.5 bits the mean of 2 and 3: the rotation makes any token look normal."""
    k, v = some_kv(2, 256, tokens=256)
    made = method("turboquant", k_bits=bits, v_bits=bits)
    for x, stored in zip((k, v), made.decode(made.encode(k, v)), strict=True):
        assert relative_error(stored, x) ** 2 == pytest.approx(error, rel=0.1)
