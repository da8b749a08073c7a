"""The unbiased grid: a clipped range is widened until the codes it was read with have slope 1."""

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv.ops import apply_grid, dequantize, group_range, quantize, round_metadata, spread
from occamkv.ops.affine import clip_share, group_rms, refit

every_width = pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda b: f"{b} bits")
every_axis = pytest.mark.parametrize(("axis", "group"), [("channel", 32), ("token", 32), ("token", 64)])
CLIPS = {2: 0.85, 3: 0.9, 4: 0.9}


def some_values(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype("f4"))


def groups_of(x: Tensor, axis: str, group: int) -> np.ndarray:
    """Values group by group, float64 `[groups, values]`. x: `[N, T, D]`, D a multiple of `group`."""
    x = x.double()
    return (x.mT.reshape(-1, x.shape[-2]) if axis == "channel" else x.reshape(-1, group)).numpy()


def reconstructed(x: Tensor, *, bits: int, axis: str, group: int, clip: float, refitted: bool) -> Tensor:
    """Quantize and dequantize with exact metadata."""
    low, high = apply_grid(*group_range(x, axis=axis, group=group), bits=bits, grid="unbiased", clip=clip)
    if refitted:
        low, high = refit(x, low, high, bits=bits, axis=axis, group=group)
    meta = round_metadata(low, high, bits=bits, metadata_bits=32)
    scale, minimum = (spread(t, axis=axis, group=group, head_dim=x.shape[-1]) for t in (meta.scale, meta.minimum))
    return dequantize(quantize(x, scale=scale, minimum=minimum, bits=bits), scale=scale, minimum=minimum)


def slopes(x: Tensor, stored: Tensor, axis: str, group: int) -> np.ndarray:
    """Slope of the regression of what is stored on what was given, of each group."""
    x, y = (groups_of(t, axis, group) for t in (x, stored))
    x, y = (t - t.mean(1, keepdims=True) for t in (x, y))
    return (x * y).sum(1) / (x * x).sum(1)


@every_width
@every_axis
def test_what_is_stored_shrinks_at_most_by_two_percent_where_clipping_alone_shrinks_it_more(axis, group, bits):
    """Codes are chosen anew in the wider range, so a part of the shrinking stays."""
    x = some_values(20, 32, 128) + 0.5
    how = {"bits": bits, "axis": axis, "group": group, "clip": CLIPS[bits]}
    refitted = slopes(x, reconstructed(x, **how, refitted=True), axis, group)
    clipped = slopes(x, reconstructed(x, **how, refitted=False), axis, group)
    assert refitted.mean() == pytest.approx(1, abs=0.02)
    assert clipped.mean() < 0.985, "the twin: without the second look it shrinks"
    assert 1 - refitted.mean() < 0.65 * (1 - clipped.mean())


@every_width
@every_axis
def test_with_the_codes_of_the_clipped_range_the_slope_is_one_to_rounding(axis, group, bits):
    x = some_values(4, 32, 128, seed=1) - 3
    before = apply_grid(*group_range(x, axis=axis, group=group), bits=bits, grid="unbiased", clip=CLIPS[bits])
    after = refit(x, *before, bits=bits, axis=axis, group=group)
    wide = {"axis": axis, "group": group, "head_dim": 128}
    (scale, minimum), (new_scale, new_minimum) = (
        (spread((high - low) / (2**bits - 1), **wide), spread(low, **wide)) for low, high in (before, after)
    )
    codes = quantize(x, scale=scale, minimum=minimum, bits=bits)
    stored = dequantize(codes, scale=new_scale, minimum=new_minimum)
    assert np.abs(slopes(x, stored, axis, group) - 1).max() < 1e-4
    mean_error = groups_of(stored, axis, group).mean(1) - groups_of(x, axis, group).mean(1)
    assert np.abs(mean_error).max() < 1e-5, "the mean of a group stays where it is"


@every_axis
def test_a_range_never_becomes_more_than_twice_as_wide(axis, group):
    x = some_values(30, 32, 128, seed=2)
    heavy = x.sign() * x.abs() ** 6  # a few values far out: what clips worst
    for values, clip, limited in ((heavy, 0.2, True), (x, 0.85, False)):
        low, high = apply_grid(*group_range(values, axis=axis, group=group), bits=2, grid="unbiased", clip=clip)
        new_low, new_high = refit(values, low, high, bits=2, axis=axis, group=group)
        grown = (new_high - new_low) / (high - low)
        assert grown.max() <= 2 * (1 + 1e-5)
        assert ((grown > 1.99).float().mean() > 0.5) == limited


@every_width
@every_axis
def test_constant_groups_keep_their_value_and_a_short_last_group_is_its_own(axis, group, bits):
    x = some_values(2, 32, 80, seed=3)
    constant = (0, 3) if axis == "token" else (0, slice(None), 3)
    x[constant] = 0.7
    x[1] = 0.0
    how = {"bits": bits, "axis": axis, "group": group, "clip": 0.85}
    stored = reconstructed(x, **how, refitted=True)
    assert stored.isfinite().all()
    assert not stored[1].any()
    assert stored[constant].numpy() == pytest.approx(0.7, rel=1e-6)
    if axis == "token":
        alone = reconstructed(x[..., 64:].contiguous(), **how, refitted=True)
        assert torch.allclose(stored[..., 64:], alone, atol=1e-6)


CLIP_TABLE = {(2, 32): 0.85, (3, 32): 0.95, (4, 32): 1.0, (2, 64): 0.8, (3, 64): 0.9, (4, 64): 1.0, (2, 24): 0.85}


def test_the_share_of_a_range_that_is_kept_follows_bits_and_group():
    assert {key: clip_share(*key) for key in CLIP_TABLE} == CLIP_TABLE
    assert clip_share(2, 256) == clip_share(2, 128) == clip_share(2, 64)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 64), (3, 32), (3, 64)], ids=lambda n: str(n))
def test_for_normal_numbers_the_share_is_better_than_the_whole_range(bits, group):
    x = some_values(400, 32, 64, seed=4)
    ours, whole = (
        (reconstructed(x, bits=bits, axis="token", group=group, clip=clip, refitted=False) - x).square().mean()
        for clip in (clip_share(bits, group), 1.0)
    )
    assert ours < 0.96 * whole


@pytest.mark.parametrize(("head_dim", "group"), [(64, 32), (80, 32), (24, 24), (112, 64)], ids=lambda n: str(n))
def test_root_mean_squares_are_those_of_each_run(head_dim, group):
    x = some_values(2, 3, 5, head_dim) * 3 + 1
    runs = [x.double().numpy()[..., i : i + group] for i in range(0, head_dim, group)]
    rms = np.stack([np.sqrt((r**2).mean(-1)) for r in runs], -1)
    assert group_rms(x, axis="token", group=group).numpy() == pytest.approx(rms, rel=1e-6)
    by_channel = np.sqrt((x.double().numpy() ** 2).mean(-2, keepdims=True))
    assert group_rms(x, axis="channel", group=5).numpy() == pytest.approx(by_channel, rel=1e-6)


@every_axis
def test_a_group_gives_the_same_bits_alone_and_among_others(axis, group):
    x = some_values(9, 3, 32, 80, seed=5)
    low, high = group_range(x, axis=axis, group=group)
    together = refit(x, low, high, bits=2, axis=axis, group=group)
    rms = group_rms(x, axis=axis, group=group)
    for n in (0, 4, 8):
        one = slice(n, n + 1)
        alone = refit(x[one], low[one], high[one], bits=2, axis=axis, group=group)
        assert all(torch.equal(a, t[one]) for a, t in zip(alone, together, strict=True))
        assert torch.equal(group_rms(x[one], axis=axis, group=group), rms[one])
