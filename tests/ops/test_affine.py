"""Group ranges, grids, codes and reconstruction against float64 formulas."""

import numpy as np
import pytest
import torch

from occamkv.ops import apply_grid, dequantize, group_range, quantize, round_metadata, spread

every_width = pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
CHANNEL_GROUPS = [(64, 32), (64, 64), (80, 32), (48, 32), (112, 64), (8, 8), (256, 256)]


def some_values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("f4"))


@pytest.mark.parametrize("tokens", [32, 64, 128], ids=lambda t: f"{t} tokens")
def test_channel_groups_span_all_tokens_of_the_record(tokens):
    x = some_values(2, 3, tokens, 24)
    low, high = group_range(x, axis="channel", group=tokens)
    assert low.shape == high.shape == (2, 3, 1, 24)
    assert np.array_equal(low.numpy(), x.numpy().min(axis=2, keepdims=True))
    assert np.array_equal(high.numpy(), x.numpy().max(axis=2, keepdims=True))


@pytest.mark.parametrize(("head_dim", "group"), CHANNEL_GROUPS, ids=lambda n: str(n))
@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0], ids=lambda o: f"values near {o:g}")
def test_token_groups_are_runs_of_channels_and_the_last_may_be_shorter(head_dim, group, offset):
    x = some_values(2, 3, 5, head_dim) + offset
    low, high = group_range(x, axis="token", group=group)
    runs = [x.numpy()[..., i : i + group] for i in range(0, head_dim, group)]
    assert np.array_equal(low.numpy(), np.stack([r.min(-1) for r in runs], -1))
    assert np.array_equal(high.numpy(), np.stack([r.max(-1) for r in runs], -1))
    wide = spread(low, axis="token", group=group, head_dim=head_dim)
    expected = [np.broadcast_to(r.min(-1, keepdims=True), r.shape) for r in runs]
    assert np.array_equal(wide.numpy(), np.concatenate(expected, -1))


def test_twin_zero_padding_of_a_short_group_would_move_its_range():
    x = some_values(2, 80) * 0.1 + 50
    low, _ = group_range(torch.nn.functional.pad(x, (0, 16)), axis="token", group=32)
    assert not torch.equal(low, group_range(x, axis="token", group=32)[0])


def test_one_channel_value_is_broadcast_over_tokens_as_it_is():
    values = some_values(2, 1, 24)
    assert torch.equal(spread(values, axis="channel", group=32, head_dim=24), values)


def paper_in_float64(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """delta, zero point and its distance from a rounding tie."""
    delta = (high - low) / (2**bits - 1)
    fraction = np.abs((-low / delta) % 1 - 0.5)
    return delta, np.round(-low / delta), fraction


def ranges(seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges that straddle zero, and ranges far from it on either side."""
    a, b = some_values(60, seed=seed), some_values(60, seed=seed + 1)
    offset = torch.tensor([0.0, 3.0, -3.0, 40.0, -40.0, 0.1]).repeat(10)
    return torch.minimum(a, b) + offset, torch.maximum(a, b) + offset


@every_width
def test_minmax_keeps_the_range(bits):
    low, high = ranges()
    assert all(map(torch.equal, apply_grid(low, high, bits=bits, grid="minmax"), (low, high)))


@pytest.mark.parametrize("clip", [0.5, 0.85, 0.99], ids=lambda c: f"clip {c}")
def test_clip_shrinks_the_range_around_its_middle(clip):
    low, high = ranges()
    a, b = (t.double() for t in apply_grid(low, high, bits=2, grid="minmax", clip=clip))
    wide = low.double(), high.double()
    assert torch.allclose((a + b) / 2, (wide[0] + wide[1]) / 2, rtol=1e-6, atol=1e-6)
    assert torch.allclose(b - a, (wide[1] - wide[0]) * clip, rtol=1e-4, atol=1e-5)


def assert_is_the_paper_grid(grid, bits: int, clip: float) -> None:
    low, high = ranges()
    a, b = (t.double().numpy() for t in grid(low, high, bits, clip))
    middle, half = (high + low).double().numpy() / 2, (high - low).double().numpy() / 2 * clip
    delta, zero, from_tie = paper_in_float64(middle - half, middle + half, bits)
    float32_noise = 1e-6 * (1 + (middle / delta) ** 2)  # of the zero point: low and delta are float32 differences
    clear = from_tie > float32_noise
    assert clear.mean() > 0.6
    assert (np.abs(a + zero * delta) <= float32_noise * delta)[clear].all()
    assert np.allclose((b - a)[clear], (2**bits - 1) * delta[clear], rtol=1e-3, atol=1e-5)


@every_width
@pytest.mark.parametrize("clip", [1.0, 0.85], ids=lambda c: f"clip {c}")
def test_paper_grid_has_its_zero_point_rounded(bits, clip):
    assert_is_the_paper_grid(lambda low, high, b, c: apply_grid(low, high, bits=b, grid="paper", clip=c), bits, clip)


def test_twin_the_check_sees_a_grid_without_the_rounded_zero_point():
    with pytest.raises(AssertionError):
        assert_is_the_paper_grid(lambda low, high, b, c: apply_grid(low, high, bits=b, grid="minmax", clip=c), 2, 1.0)


@every_width
def test_paper_grid_reconstructs_zero_exactly_when_the_group_straddles_it(bits):
    low, high = -some_values(50, seed=7).abs(), some_values(50, seed=8).abs()
    a, b = apply_grid(low, high, bits=bits, grid="paper")
    meta = round_metadata(a[:, None], b[:, None], bits=bits, metadata_bits=32)
    codes = quantize(torch.zeros(50, 1), scale=meta.scale, minimum=meta.minimum, bits=bits)
    assert dequantize(codes, scale=meta.scale, minimum=meta.minimum).abs().max() < 1e-6


@pytest.mark.parametrize("grid", ["minmax", "paper"])
@pytest.mark.parametrize("clip", [1.0, 0.85], ids=lambda c: f"clip {c}")
def test_a_constant_group_keeps_its_value(grid, clip):
    value = torch.tensor([0.0, 3.0, -7.5, 1e-6, 60000.0])
    low, high = apply_grid(value, value, bits=2, grid=grid, clip=clip)
    assert torch.equal(low, value)
    assert torch.equal(high, value)


@every_width
def test_codes_are_the_nearest_levels_and_clamped(bits):
    scale, minimum = torch.tensor(0.37), torch.tensor(-1.2)
    x = torch.linspace(-3, 8, 1001)
    levels = -1.2 + 0.37 * np.arange(2**bits)
    distance = np.abs(x.double().numpy()[:, None] - levels)
    codes = quantize(x, scale=scale, minimum=minimum, bits=bits)
    assert codes.dtype == torch.uint8
    chosen = np.take_along_axis(distance, codes.numpy().astype(int)[:, None], 1)[:, 0]
    assert np.abs(chosen - distance.min(1)).max() < 1e-6
    assert (codes.min(), codes.max()) == (0, 2**bits - 1)


def test_twin_truncated_codes_are_not_the_nearest():
    x = torch.linspace(-1.2, -0.1, 101)
    codes = ((x + 1.2) / 0.37).to(torch.uint8)
    assert not torch.equal(codes, quantize(x, scale=torch.tensor(0.37), minimum=torch.tensor(-1.2), bits=2))


def test_ties_go_to_the_even_code():
    x = torch.tensor([0.5, 1.5, 2.5])
    assert quantize(x, scale=torch.tensor(1.0), minimum=torch.tensor(0.0), bits=2).tolist() == [0, 2, 2]


def test_a_group_with_scale_zero_has_code_zero():
    codes = quantize(torch.full((4,), 2.0), scale=torch.tensor(0.0), minimum=torch.tensor(2.0), bits=2)
    assert codes.tolist() == [0, 0, 0, 0]


@every_width
def test_dequantize_is_code_times_scale_plus_minimum(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(5, 1)
    scale, minimum = some_values(5, 1).abs().half().float(), some_values(5, 1, seed=1).half().float()
    expected = codes.double() * scale.double() + minimum.double()
    assert torch.equal(dequantize(codes, scale=scale, minimum=minimum), expected.to(torch.float32))


def largest_error_in_steps(x: torch.Tensor, bits: int, axis: str, metadata_bits: int, used_bits: int) -> float:
    """Largest |reconstruction - x| in units of the step (max - min) / (2^bits - 1), by groups."""
    low, high = group_range(x, axis=axis, group=32)
    meta = round_metadata(low, high, bits=used_bits, metadata_bits=metadata_bits)
    wide = {"axis": axis, "group": 32, "head_dim": x.shape[-1]}
    scale, minimum = spread(meta.scale, **wide), spread(meta.minimum, **wide)
    codes = quantize(x, scale=scale, minimum=minimum, bits=used_bits)
    error = (dequantize(codes, scale=scale, minimum=minimum).double() - x.double()).abs()
    return float((error / spread((high - low).double() / (2**bits - 1), **wide)).max())


@every_width
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(
    ("metadata_bits", "bound"), [(32, 0.5001), (16, 0.52)], ids=["exact metadata", "float16 metadata"]
)
def test_reconstruction_is_within_half_a_step(axis, bits, metadata_bits, bound):
    assert largest_error_in_steps(some_values(4, 32, 80, seed=9), bits, axis, metadata_bits, bits) < bound


def test_twin_one_bit_less_breaks_the_half_step_bound():
    assert largest_error_in_steps(some_values(4, 32, 80, seed=9), 3, "channel", 32, 2) > 1.0
