"""The rotation against an explicit Sylvester matrix in float64, for every head_dim that a model may have."""

import numpy as np
import pytest
import torch

from occamkv.ops import hadamard, hadamard_block, rotate, rotate_back

HEAD_DIMS = (16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 256)
BLOCKS = {16: 16, 24: 8, 32: 32, 48: 16, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 192: 64, 256: 256}

every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda d: f"head_dim {d}")


def sylvester(head_dim: int, block: int) -> np.ndarray:
    """`H[i, j] = (-1) ** popcount(i & j) / sqrt(block)`, repeated along the diagonal."""
    square = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return np.kron(np.eye(head_dim // block), np.array(square) / np.sqrt(block))


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_rotates_by(matrix: np.ndarray, rotation, x: torch.Tensor) -> None:
    expected = x.double().numpy() @ matrix
    assert np.abs(rotation(x).double().numpy() - expected).max() < 2e-6 * np.abs(expected).max()


@every_head_dim
def test_rotation_is_the_sylvester_matrix_of_the_largest_power_of_two_block(head_dim):
    assert hadamard_block(head_dim) == BLOCKS[head_dim]
    assert_rotates_by(sylvester(head_dim, BLOCKS[head_dim]), hadamard, some_tokens(2, 3, 5, head_dim))


@pytest.mark.parametrize("block", [2, 4, 16, 64], ids=lambda b: f"blocks of {b}")
def test_a_smaller_block_can_be_asked_for(block):
    assert_rotates_by(sylvester(64, block), lambda x: hadamard(x, block=block), some_tokens(4, 64))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda x: hadamard(x) * 8, id="no normalisation"),
        pytest.param(lambda x: hadamard(x, block=32), id="half the block"),
        pytest.param(lambda x: hadamard(x).flip(-1), id="another order of rows"),
        pytest.param(lambda x: hadamard(x * torch.tensor([1.0, -1.0]).repeat(32)), id="random signs"),
    ],
)
def test_twin_the_matrix_check_sees_a_wrong_rotation(wrong):
    with pytest.raises(AssertionError):
        assert_rotates_by(sylvester(64, 64), wrong, some_tokens(4, 64))


@every_head_dim
def test_rotation_is_orthonormal_and_its_own_inverse(head_dim):
    eye = torch.eye(head_dim)
    matrix = hadamard(eye).double()
    assert (matrix @ matrix.T - eye.double()).abs().max() < 1e-6
    assert (matrix - matrix.T).abs().max() == 0
    x = some_tokens(7, head_dim)
    assert (hadamard(hadamard(x)) - x).abs().max() < 2e-6 * x.abs().max()


@every_head_dim
def test_a_token_is_rotated_to_the_same_bits_alone_and_in_a_batch(head_dim):
    x = some_tokens(3, 2, 33, head_dim)
    together = hadamard(x)
    for b, h, t in [(0, 0, 0), (1, 1, 17), (2, 0, 32)]:
        assert torch.equal(hadamard(x[b, h, t]), together[b, h, t])
        assert torch.equal(hadamard(x[b : b + 1, h : h + 1, t : t + 1])[0, 0, 0], together[b, h, t])
    assert torch.equal(hadamard(x[:, :, 5:9]), together[:, :, 5:9])


def test_twin_bit_equality_sees_the_last_bit():
    x = hadamard(some_tokens(2, 64))
    assert not torch.equal(torch.nextafter(x, torch.full_like(x, 9.0)), x)


def test_a_strided_view_is_rotated_like_its_copy():
    x = some_tokens(2, 9, 3, 64).transpose(1, 2)
    assert torch.equal(hadamard(x), hadamard(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_float_dtype_is_rotated_in_float32(dtype):
    x = some_tokens(5, 96).to(dtype)
    assert hadamard(x).dtype == torch.float32
    assert torch.equal(hadamard(x), hadamard(x.to(torch.float32)))


def test_input_is_left_alone():
    x = some_tokens(1, 2, 3, 64)
    before = x.clone()
    rotate(x, hadamard_block=64, balance=torch.full((2, 64), 2.0))
    rotate_back(x, hadamard_block=64, balance=torch.full((2, 64), 2.0))
    assert torch.equal(x, before)


def logits_moved_by(q_balance: torch.Tensor, k_balance: torch.Tensor, block: int | None, head_dim: int) -> float:
    """Largest change of q . k when both sides are rotated and balanced, relative to the largest logit."""
    q, k = some_tokens(2, 3, 4, head_dim, seed=1), some_tokens(2, 3, 6, head_dim, seed=2)
    rotated_q = rotate(q, hadamard_block=block, balance=q_balance).double()
    rotated_k = rotate(k, hadamard_block=block, balance=k_balance).double()
    exact = q.double() @ k.double().mT
    return float((rotated_q @ rotated_k.mT - exact).abs().max() / exact.abs().max())


def a_balance(head_dim: int) -> torch.Tensor:
    return torch.exp(0.5 * some_tokens(3, head_dim, seed=3))


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "balance alone"])
@pytest.mark.parametrize("head_dim", [64, 80, 256], ids=lambda d: f"head_dim {d}")
def test_logits_are_kept_when_queries_use_the_inverse_balance(head_dim, rotated):
    block = BLOCKS[head_dim] if rotated else None
    d = a_balance(head_dim)
    assert logits_moved_by(1 / d, d, block, head_dim) < 5e-6


def test_twin_logits_move_when_queries_use_the_same_balance():
    d = a_balance(64)
    assert logits_moved_by(d, d, 64, 64) > 0.1


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "no balance"])
@pytest.mark.parametrize("block", [None, 16], ids=["not rotated", "rotated"])
def test_rotate_is_the_formula_and_rotate_back_undoes_it(block, balanced):
    d = a_balance(80) if balanced else None
    k = some_tokens(2, 3, 5, 80)
    matrix = np.eye(80) if block is None else sylvester(80, block)
    scaled = k.double().numpy() * (1.0 if d is None else d.double().numpy()[:, None, :])
    rotated = rotate(k, hadamard_block=block, balance=d)
    assert np.abs(rotated.double().numpy() - scaled @ matrix).max() < 1e-5
    assert (rotate_back(rotated, hadamard_block=block, balance=d) - k).abs().max() < 1e-5


def test_balance_belongs_to_a_head():
    k = some_tokens(1, 3, 2, 64)
    d = torch.ones(3, 64)
    d[1] = 2.0
    plain, balanced = rotate(k, hadamard_block=64), rotate(k, hadamard_block=64, balance=d)
    assert torch.equal(balanced[:, [0, 2]], plain[:, [0, 2]])
    assert torch.equal(balanced[:, 1], plain[:, 1] * 2)
