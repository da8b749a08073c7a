"""Norms per token over all heads: right against float64, and the same bits in every batch."""

import numpy as np
import pytest
import torch

from occamkv.ops import token_norm
from occamkv.ops.norms import NORMS, sinkhorn_norm
from paper_formulas import slow_sinkhorn

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


def uneven_tokens(*, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """K `[1, H, G, D]` whose tokens have planted lengths but for one channel, which is large in every token alike."""
    generator = np.random.default_rng(seed)
    k = generator.standard_normal((1, 2, 32, 64))
    lengths = np.exp(0.8 * generator.standard_normal(32))
    k *= lengths[:, None]
    k[:, 0, :, 5] = 300 * generator.standard_normal(32)
    return torch.from_numpy(k.astype("f4")), lengths


def unevenness(k: torch.Tensor, norm: torch.Tensor) -> float:
    """Standard deviation of the logarithm of token lengths over the quiet channels, after the norm is divided out."""
    rest = torch.cat((k[:, 0, :, :5], k[:, 0, :, 6:], k[:, 1]), dim=-1) / norm[..., None]
    return float(rest.norm(dim=-1).log().std())


def test_the_sinkhorn_norm_evens_out_tokens_although_one_channel_dominates():
    k, lengths = uneven_tokens()
    norm = sinkhorn_norm(k)
    assert norm.shape == (1, 32)
    assert norm.dtype == torch.float32
    assert np.log(lengths).std() > 0.6
    assert unevenness(k, norm) < 0.15
    assert np.corrcoef(np.log(lengths), norm[0].log().numpy())[0, 1] > 0.98


def test_twin_the_l2_norm_sees_only_the_channel_that_dominates():
    k, _ = uneven_tokens()
    assert unevenness(k, token_norm(k)) > 0.6


@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (1, 1, 128, 24), (3, 8, 64, 8)], ids=lambda s: "x".join(map(str, s)))
def test_the_sinkhorn_norm_is_that_of_slow_rounds(shape):
    k = some_keys(shape)
    expected = np.stack([slow_sinkhorn(group) for group in k.double().numpy()])
    assert sinkhorn_norm(k).double().numpy() == pytest.approx(expected, rel=1e-4)
    assert sinkhorn_norm(k).amax(1).numpy() == pytest.approx(token_norm(k).amax(1).numpy(), rel=1e-6)


def test_of_equal_tokens_the_sinkhorn_norm_is_the_l2_norm():
    k = torch.full((1, 2, 32, 16), 3.0)
    assert torch.allclose(sinkhorn_norm(k), token_norm(k))


ZEROS = {
    "all": lambda k: k * 0,
    "a token": lambda k: k * (torch.arange(32) != 5)[:, None],
    "all but one token": lambda k: k * (torch.arange(32) == 5)[:, None],
    "a channel": lambda k: k * (torch.arange(64) != 5),
    "all but one channel": lambda k: k * (torch.arange(64) == 5),
    "a head": lambda k: k * torch.tensor([0.0, 1.0])[:, None, None],
    "a channel that never changes": lambda k: torch.where(torch.arange(64) == 5, 7.0, k),
}


@pytest.mark.parametrize("what", ZEROS)
def test_zeros_give_a_finite_norm(what):
    k = ZEROS[what](some_keys((2, 2, 32, 64)))
    norm = sinkhorn_norm(k)
    assert norm.isfinite().all()
    assert (norm >= 0).all()
    assert norm.amax(1).numpy() == pytest.approx(token_norm(k).amax(1).numpy(), rel=1e-6)


def test_a_group_has_the_same_sinkhorn_norm_alone_and_among_others():
    k = some_keys((5, 3, 32, 80))
    together = sinkhorn_norm(k)
    for n in range(5):
        assert torch.equal(sinkhorn_norm(k[n : n + 1])[0], together[n])
    assert torch.equal(sinkhorn_norm(k.transpose(1, 2).contiguous().transpose(1, 2)), together)


def test_norms_are_chosen_by_name():
    k = some_keys((1, 2, 32, 16))
    assert torch.equal(NORMS["l2"](k), token_norm(k))
    assert torch.equal(NORMS["sinkhorn"](k), sinkhorn_norm(k))
    assert not torch.equal(token_norm(k), sinkhorn_norm(k))
