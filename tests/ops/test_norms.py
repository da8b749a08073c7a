"""One norm per token over all heads: right against float64, and the same bits in every batch."""

import numpy as np
import pytest
import torch

from occamkv.ops import token_norm

SHAPES = [(1, 1, 4, 64), (2, 3, 5, 64), (1, 8, 3, 128), (2, 1, 7, 256), (1, 5, 4, 80), (1, 2, 3, 24), (1, 2, 3, 7)]


def some_keys(shape: tuple[int, ...]) -> torch.Tensor:
    generator = np.random.default_rng(sum(shape))
    return torch.from_numpy((generator.standard_normal(shape) * np.exp(generator.standard_normal(shape))).astype("f4"))


def float64_norm(k: torch.Tensor) -> np.ndarray:
    return np.sqrt((k.double().numpy() ** 2).sum(axis=(1, 3)))


def assert_is_the_norm(norm, k: torch.Tensor) -> None:
    expected = float64_norm(k)
    assert norm(k).shape == expected.shape
    assert np.abs(norm(k).double().numpy() / expected - 1).max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_norm_is_the_l2_norm_over_heads_and_channels(shape):
    assert token_norm(some_keys(shape)).dtype == torch.float32
    assert_is_the_norm(token_norm, some_keys(shape))


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda k: k.norm(dim=-1)[:, 0], id="norm of one head"),
        pytest.param(lambda k: k.square().mean((1, 3)).sqrt(), id="root of the mean square"),
        pytest.param(lambda k: k.abs().sum((1, 3)), id="L1 norm"),
        pytest.param(lambda k: k.norm(dim=(1, 3)) * (1 + 1e-5), id="off by 1e-5"),
    ],
)
def test_twin_the_check_sees_another_norm(wrong):
    with pytest.raises(AssertionError):
        assert_is_the_norm(wrong, some_keys((2, 3, 5, 64)))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_a_token_has_the_same_bits_alone_and_in_any_batch_or_length(shape):
    k = some_keys(shape)
    together = token_norm(k)
    for b in range(shape[0]):
        assert torch.equal(token_norm(k[b : b + 1])[0], together[b])
        for t in range(shape[2]):
            assert torch.equal(token_norm(k[b : b + 1, :, t : t + 1])[0, 0], together[b, t])
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(token_norm(strided), together)
    assert torch.equal(token_norm(k.repeat(3, 1, 40, 1))[: shape[0], : shape[2]], together)


def test_twin_a_norm_summed_in_another_order_has_other_bits():
    k = some_keys((4, 3, 64, 64))
    backwards = token_norm(k.flip(1))
    assert not torch.equal(backwards, token_norm(k))
    assert torch.allclose(backwards, token_norm(k))


def test_a_zero_token_has_norm_zero():
    k = some_keys((1, 2, 3, 64))
    k[:, :, 1] = 0
    assert token_norm(k)[0, 1] == 0
    assert (token_norm(k)[0, [0, 2]] > 0).all()


def test_bfloat16_keys_are_squared_in_float32():
    k = some_keys((1, 2, 3, 64)).to(torch.bfloat16)
    assert torch.equal(token_norm(k), token_norm(k.to(torch.float32)))
