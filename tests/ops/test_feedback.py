"""Error feedback against the recursive formula of GPTQ and LDLQ in float64, and its effect on correlated queries."""

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv.ops import apply_grid, dequantize, group_range, hadamard, quantize, rotate, round_metadata
from occamkv.ops.affine import quantize_with_feedback
from occamkv.ops.balance import feedback_matrix

TIE = 1e-4  # a quotient this close to .5 may be rounded either way by float32


def some_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("f4"))


def correlated_moment(heads: int, head_dim: int, *, seed: int = 0) -> Tensor:
    """E[q q^T] of queries that lie mostly in a few directions."""
    generator = np.random.default_rng(seed)
    strength = np.exp(-0.15 * np.arange(head_dim))
    basis = np.stack([np.linalg.qr(generator.standard_normal((head_dim, head_dim)))[0] for _ in range(heads)])
    return torch.from_numpy(((basis * strength) @ basis.swapaxes(1, 2)).astype("f4"))


def scales(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = apply_grid(*group_range(x, axis="channel", group=32), bits=bits, grid="minmax")
    meta = round_metadata(low, high, bits=bits, metadata_bits=32)
    return meta.scale, meta.minimum


def by_recursion(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray, bits: int, moment: np.ndarray):
    """Optimal brain quantization, channel by channel (arXiv:2210.17323, equations 2 and 3), for one head.

    Rounding channel c moves the channels left by -error * P[c, j] / P[c, c], P the inverse of the moment of the
    channels that are not yet rounded; then c is taken out of P. x: [n, T, D]. Returns codes, and which tokens met no
    rounding tie.
    """
    rest, inverse = x.astype(np.float64).copy(), np.linalg.inv(moment.astype(np.float64))
    codes, clear = np.zeros(x.shape, dtype=np.int64), np.ones(x.shape[:-1], dtype=bool)
    for c in range(x.shape[-1]):
        quotient = (rest[..., c] - minimum[..., c]) / scale[..., c]
        clear &= np.abs(quotient % 1 - 0.5) > TIE
        codes[..., c] = np.clip(np.round(quotient), 0, 2**bits - 1)
        error = rest[..., c] - (codes[..., c] * scale[..., c] + minimum[..., c])
        rest -= error[..., None] * inverse[c] / inverse[c, c]
        inverse = inverse - np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, c] = 1.0  # taken out; nothing refers to it again
    return codes, clear


def ldl_feedback(moment: np.ndarray) -> np.ndarray:
    """LDLQ (arXiv:2307.13304): with M = L^T D L, L unit lower triangular, the later channels take up L's rows.

    Channel j moves by `-sum_c F[c, j] error_c`, F the unit upper factor of the inverse: M^-1 = F^T diag F.
    """
    inverse, size = np.linalg.inv(moment.astype(np.float64)), len(moment)
    passed = np.zeros((size, size))
    for c in range(size):  # Gaussian elimination: row c of the Schur complement over its pivot
        passed[c, c + 1 :] = inverse[c, c + 1 :] / inverse[c, c]
        inverse[c + 1 :, c + 1 :] -= np.outer(inverse[c + 1 :, c], inverse[c, c + 1 :]) / inverse[c, c]
    return passed


def damped(moment: Tensor, damping: float) -> np.ndarray:
    m = moment.double().numpy()
    return np.stack([one + damping * np.diag(one).mean() * np.eye(len(one)) for one in m])


def explicit(moment: Tensor, matrix: np.ndarray, d: Tensor | None) -> np.ndarray:
    """The second moment of H(q / d), from the dense matrix H."""
    inverse = np.ones(moment.shape[:2]) if d is None else 1 / d.double().numpy()
    turned = matrix.T * inverse[:, None, :]  # [H, D', D]: H diag(1 / d)
    return turned @ moment.double().numpy() @ turned.swapaxes(1, 2)


@pytest.mark.parametrize("damping", [0.01, 0.2], ids=lambda x: f"damping {x}")
@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "not balanced"])
@pytest.mark.parametrize(("head_dim", "block"), [(64, 64), (80, 16), (24, None)], ids=lambda n: str(n))
def test_the_matrix_is_that_of_gaussian_elimination_on_the_explicit_moment(head_dim, block, balanced, damping):
    moment = correlated_moment(2, head_dim)
    d = torch.exp(0.5 * some_values(2, head_dim, seed=3)) if balanced else None
    size = block or 1
    square = hadamard(torch.eye(size)).double().numpy()
    seen = torch.from_numpy(explicit(moment, np.kron(np.eye(head_dim // size), square), d))
    passed = feedback_matrix(moment, hadamard_block=block, balance=d, damping=damping)
    assert passed.dtype == torch.float32
    assert torch.equal(passed, passed.triu(1)), "nothing is passed back"
    for got, one in zip(passed.double().numpy(), damped(seen, damping), strict=True):
        assert np.abs(got - ldl_feedback(one)).max() < 1e-4


def test_twin_the_matrix_of_an_unrotated_moment_is_another():
    moment = correlated_moment(1, 64)
    rotated = feedback_matrix(moment, hadamard_block=64, balance=None, damping=0.2)
    assert (rotated - feedback_matrix(moment, hadamard_block=None, balance=None, damping=0.2)).abs().max() > 0.01


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
def test_codes_are_those_of_the_recursive_formula(bits):
    moment = correlated_moment(2, 32)
    x = some_values(3, 2, 32, 32, seed=bits)
    scale, minimum = scales(x, bits)
    feedback = feedback_matrix(moment, hadamard_block=None, balance=None, damping=0.2)
    codes = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=bits, feedback=feedback)
    assert codes.dtype == torch.uint8
    wide = [t.expand(x.shape).double().numpy() for t in (x, scale, minimum)]
    for head, one in enumerate(damped(moment, 0.2)):
        expected, clear = by_recursion(*(t[:, head] for t in wide), bits, one)
        assert clear.mean() > 0.95
        assert np.array_equal(codes[:, head].numpy()[clear], expected[clear])
    assert not torch.equal(codes, quantize(x, scale=scale, minimum=minimum, bits=bits))


def test_twin_the_recursion_tells_another_moment_or_another_order_apart():
    moment, x = correlated_moment(1, 32), some_values(2, 1, 32, 32)
    scale, minimum = scales(x, 2)
    feedback = feedback_matrix(moment, hadamard_block=None, balance=None, damping=0.2)
    wide = [t.expand(x.shape)[:, 0].double().numpy() for t in (x, scale, minimum)]
    expected, clear = by_recursion(*wide, 2, damped(moment, 0.2)[0])
    for wrong in (feedback * 0.9, -feedback, feedback.mT, correlated_feedback_of_another_head()):
        codes = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=2, feedback=wrong.triu(1))
        assert (codes[:, 0].numpy() == expected)[clear].all(-1).mean() < 0.9


def correlated_feedback_of_another_head() -> Tensor:
    return feedback_matrix(correlated_moment(1, 32, seed=9), hadamard_block=None, balance=None, damping=0.2)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e6], ids=lambda x: f"times {x:g}")
def test_the_moment_of_uncorrelated_queries_gives_plain_rounding(factor):
    x = some_values(2, 3, 32, 64)
    scale, minimum = scales(x, 2)
    identity = factor * torch.eye(64).expand(3, -1, -1)
    feedback = feedback_matrix(identity, hadamard_block=64, balance=None, damping=0.2)
    assert feedback.abs().max() < 1e-6
    codes = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=2, feedback=torch.zeros_like(feedback))
    assert torch.equal(codes, quantize(x, scale=scale, minimum=minimum, bits=2))
    nearly = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=2, feedback=feedback)
    assert (nearly != codes).float().mean() < 1e-3


def test_a_moment_of_zeros_gives_plain_rounding():
    feedback = feedback_matrix(torch.zeros(2, 64, 64), hadamard_block=64, balance=None, damping=0.2)
    assert not feedback.any()


def error_in_the_norm_of(moment: Tensor, x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> float:
    """Mean of e^T M e: the mean squared error of logits."""
    e = (dequantize(codes, scale=scale, minimum=minimum) - x).double()
    return float(torch.einsum("nhti,hij,nhtj->", e, moment.double(), e)) / x.numel()


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
@pytest.mark.parametrize("block", [None, 64], ids=["not rotated", "rotated"])
def test_the_error_of_logits_is_smaller_than_that_of_plain_rounding(block, bits):
    moment, k = correlated_moment(2, 64), some_values(8, 2, 32, 64, seed=5)
    x = rotate(k, hadamard_block=block)
    seen = rotate(rotate(moment[None], hadamard_block=block)[0].mT[None], hadamard_block=block)[0]
    scale, minimum = scales(x, bits)
    feedback = feedback_matrix(moment, hadamard_block=block, balance=None, damping=0.2)
    plain = quantize(x, scale=scale, minimum=minimum, bits=bits)
    helped = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=bits, feedback=feedback)
    wrong = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=bits, feedback=-feedback)
    errors = [error_in_the_norm_of(seen, x, codes, scale, minimum) for codes in (helped, plain, wrong)]
    assert 1.5 * errors[0] < errors[1] < errors[2]


def test_codes_do_not_depend_on_what_else_is_encoded():
    x = some_values(6, 3, 32, 80)
    scale, minimum = scales(x, 2)
    feedback = feedback_matrix(correlated_moment(3, 80), hadamard_block=16, balance=None, damping=0.2)
    together = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=2, feedback=feedback)
    for n in range(6):
        one = slice(n, n + 1)
        alone = quantize_with_feedback(x[one], scale=scale[one], minimum=minimum[one], bits=2, feedback=feedback)
        assert torch.equal(alone, together[one])
    for h in range(3):
        one = slice(h, h + 1)
        alone = quantize_with_feedback(
            x[:, one], scale=scale[:, one], minimum=minimum[:, one], bits=2, feedback=feedback[one]
        )
        assert torch.equal(alone, together[:, one])
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        quantize_with_feedback(strided, scale=scale, minimum=minimum, bits=2, feedback=feedback), together
    )
    some_tokens = quantize_with_feedback(x[:, :, 5:9], scale=scale, minimum=minimum, bits=2, feedback=feedback)
    assert torch.equal(some_tokens, together[:, :, 5:9])


def test_input_is_left_alone_and_a_group_with_scale_zero_has_code_zero():
    x = some_values(1, 1, 32, 16)
    x[..., 4] = 2.5
    before = x.clone()
    scale, minimum = scales(x, 2)
    feedback = feedback_matrix(correlated_moment(1, 16), hadamard_block=None, balance=None, damping=0.2)
    codes = quantize_with_feedback(x, scale=scale, minimum=minimum, bits=2, feedback=feedback)
    assert torch.equal(x, before)
    assert scale[..., 4] == 0
    assert not codes[..., 4].any()
    assert codes.max() <= 3


def test_scales_per_token_are_spread_over_channels_as_given():
    x = some_values(2, 1, 4, 16)
    feedback = feedback_matrix(correlated_moment(1, 16), hadamard_block=None, balance=None, damping=0.2)
    low, high = group_range(x, axis="token", group=16)
    scale = (high - low) / 3
    codes = quantize_with_feedback(x, scale=scale, minimum=low, bits=2, feedback=feedback)
    wide = (t.expand(x.shape)[:, 0].double().numpy() for t in (x, scale, low))
    expected, clear = by_recursion(*wide, 2, damped(correlated_moment(1, 16), 0.2)[0])
    assert clear.sum() > 6
    assert np.array_equal(codes[:, 0].numpy()[clear], expected[clear])
