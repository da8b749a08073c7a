"""Affine quantization of groups: `x ~ code * scale + minimum`.

A group is one channel over all tokens of a record (`axis="channel"`, as KIVI and OScaR store K) or a run of channels
of one token (`axis="token"`, as everybody stores V). A *grid* decides the range that the codes span; the metadata is
rounded to its stored precision first and the codes are chosen after that.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from occamkv.ops.sums import folded_sum

Axis = Literal["channel", "token"]
Grid = Literal["minmax", "paper", "unbiased"]

_E4M3_MAX = 448.0
_CLIPS = {2: 0.85, 3: 0.95, 4: 1.0}
_CLIPS_WIDE = {2: 0.8, 3: 0.9, 4: 1.0}
MIN_STEPS = 16
"""With 8-bit metadata the minimum counts in scale / 16."""


class Metadata(NamedTuple):
    """What is stored for each group, and what it means.

    `scale` and `minimum` are float32 `[..., 1, D]` or `[..., T, groups]`, already rounded to what the bytes say.
    `stored_scale` and `stored_minimum` have the stored dtype. `super_scale` is float16 `[..., 1, 1]` with 8-bit
    metadata, else None.
    """

    scale: Tensor
    minimum: Tensor
    stored_scale: Tensor
    stored_minimum: Tensor
    super_scale: Tensor | None


def group_range(x: Tensor, *, axis: Axis, group: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each group.

    Args:
        x: float32 `[..., T, D]`.
        axis: "channel": one group per channel over all T tokens. "token": runs of `group` channels of each token; a
            last, shorter run is a group of its own.
        group: Channels in a group; not used for "channel".

    Returns:
        Two float32 tensors, `[..., 1, D]` for "channel", `[..., T, ceil(D / group)]` for "token".
    """
    if axis == "channel":
        low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    else:
        rest = -x.shape[-1] % group
        if rest:  # repeating a value of the last group moves neither its minimum nor its maximum
            x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], rest)), dim=-1)
        runs = x.reshape(*x.shape[:-1], -1, group)
        low, high = runs.amin(-1), runs.amax(-1)
    return low + 0.0, high + 0.0  # of zeros of both signs either is the smallest: one sign for all backends


def group_rms(x: Tensor, *, axis: Axis, group: int) -> Tensor:
    """Return the root mean square of each group; arguments and shape of the result as in `group_range`."""
    if axis == "channel":
        return x.square().mean(-2, keepdim=True).sqrt()
    return torch.stack([run.square().mean(-1) for run in x.split(group, dim=-1)], dim=-1).sqrt()


def spread(values: Tensor, *, axis: Axis, group: int, head_dim: int) -> Tensor:
    """Repeat one value per group over the channels of that group, ready to broadcast against `[..., T, D]`."""
    if axis == "channel":
        return values
    return values.repeat_interleave(group, dim=-1)[..., :head_dim]


def clip_share(bits: int, group: int) -> float:
    """Return the share of a group's range that codes of `bits` bits should span, for groups of `group` values.

    The more codes, the less is gained by giving up the ends; the larger the group, the further out they lie.
    """
    return (_CLIPS if group <= 32 else _CLIPS_WIDE)[bits]


def refit(x: Tensor, low: Tensor, high: Tensor, *, bits: int, axis: Axis, group: int) -> tuple[Tensor, Tensor]:
    """Widen a clipped range until its codes, read with it, have slope 1 on the data: they no longer shrink it.

    Clipping and least squares both shrink what they reconstruct. Random errors average out where attention is spread
    over many tokens, shrinking does not. All sums have one fixed order (`ops.sums`).

    Args:
        x: float32 `[..., T, D]`.
        low: Value of code 0 per group, as `apply_grid` returns it.
        high: Value of the highest code per group.
        bits: Bits of a code.
        axis: As in `group_range`.
        group: As in `group_range`.

    Returns:
        The new range; at most twice as wide.
    """
    if axis == "channel":
        new = _refit(x.movedim(-2, 0), low.squeeze(-2), high.squeeze(-2), bits=bits)
        return new[0].unsqueeze(-2), new[1].unsqueeze(-2)
    runs = zip(x.split(group, dim=-1), low.unbind(-1), high.unbind(-1), strict=True)
    parts = [_refit(run.movedim(-1, 0).contiguous(), lowest, highest, bits=bits) for run, lowest, highest in runs]
    return torch.stack([part[0] for part in parts], dim=-1), torch.stack([part[1] for part in parts], dim=-1)


def _refit(x: Tensor, low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Refit groups that lie along the first dimension of x."""
    steps, count = 2**bits - 1, x.shape[0]
    scale = (high - low) / steps
    codes = quantize(x, scale=scale, minimum=low, bits=bits).to(torch.float32)
    x_mean, code_mean = folded_sum(x, dim=0) / count, folded_sum(codes, dim=0) / count
    x_off, code_off = x - x_mean, codes - code_mean
    variance, covariance = folded_sum(x_off.square(), dim=0), folded_sum(x_off * code_off, dim=0)
    slope = torch.where(covariance > 0, variance / covariance.clamp_min(1e-30), scale)
    scale = torch.minimum(slope, 2 * scale)
    low = x_mean - scale * code_mean
    return low, low + steps * scale


def apply_grid(low: Tensor, high: Tensor, *, bits: int, grid: Grid, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the range that the lowest and the highest code stand for.

    `minmax` keeps the range of the group. `paper` moves it so that zero falls on a code (the integer zero point of
    arXiv:2605.19660: `z = round(-min / scale)`; stored as `minimum = -z * scale`). `clip` shrinks the range around its
    middle before that.
    """
    if clip != 1.0:
        middle, half = (high + low) / 2, (high - low) / 2 * clip
        low, high = middle - half, middle + half
    if grid == "paper":
        steps = 2**bits - 1
        scale = (high - low) / steps
        zero = torch.round(-low / torch.where(scale > 0, scale, 1.0))
        moved = torch.where(scale > 0, -zero * scale, low)
        low, high = moved, moved + steps * scale
    return low, high


def round_metadata(low: Tensor, high: Tensor, *, bits: int, metadata_bits: int) -> Metadata:
    """Round scale and minimum to their stored precision.

    Args:
        low: Value of code 0, float32.
        high: Value of the highest code, float32.
        bits: Bits of a code.
        metadata_bits: 16: both float16. 8: scale in float8 e4m3 times a float16 super-scale (a power of two per
            record), minimum as int8 in units of scale / 16; a scale too small to reach its minimum is enlarged, so a
            constant group far from zero stays near its value. 32: nothing is rounded (for tests against formulas).
    """
    steps = 2**bits - 1
    if metadata_bits == 32:
        scale = (high - low) / steps
        return Metadata(scale, low, scale, low, None)
    if metadata_bits == 16:
        stored_minimum = low.to(torch.float16)
        minimum = stored_minimum.to(torch.float32)
        scale = ((high - minimum) / steps).clamp_min(0) + 0.0  # never the negative zero of an underflow
        stored_scale = scale.to(torch.float16)
        return Metadata(stored_scale.to(torch.float32), minimum, stored_scale, stored_minimum, None)
    scale = torch.maximum((high - low) / steps, low.abs() * (MIN_STEPS / 127))
    largest = scale.amax((-2, -1), keepdim=True)
    exponent = torch.frexp(largest / _E4M3_MAX).exponent.clamp(-14, 15)
    super_scale = torch.ldexp(torch.ones_like(largest), exponent).to(torch.float16)
    unit = super_scale.to(torch.float32)
    stored_scale = (scale / unit).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    scale = stored_scale.to(torch.float32) * unit
    quotient = low * MIN_STEPS / torch.where(scale > 0, scale, 1.0)
    stored_minimum = torch.round(quotient).clamp(-128, 127).to(torch.int8)
    minimum = stored_minimum.to(torch.float32) * (scale / MIN_STEPS)
    return Metadata(scale, minimum, stored_scale, stored_minimum, super_scale)


def quantize(x: Tensor, *, scale: Tensor, minimum: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, uint8 `[..., T, D]`.

    Args:
        x: float32 `[..., T, D]`.
        scale: Broadcasts against x; a group with scale 0 gets code 0.
        minimum: Broadcasts against x.
        bits: Bits of a code.
    """
    codes = torch.round((x - minimum) / torch.where(scale > 0, scale, 1.0))
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def quantize_with_feedback(x: Tensor, *, scale: Tensor, minimum: Tensor, bits: int, feedback: Tensor) -> Tensor:
    """Return codes that are chosen channel after channel, each error made up for by the channels behind it.

    The sums are element-wise in a fixed order, so codes do not depend on what else is encoded in the same call.

    Args:
        x: float32 `[N, H, T, D]`.
        scale: Broadcasts against x; a group with scale 0 gets code 0.
        minimum: Broadcasts against x.
        bits: Bits of a code.
        feedback: F, `[H, D, D]`, see `ops.balance.feedback_matrix`.

    Returns:
        uint8 `[N, H, T, D]`.
    """
    rest = x.permute(3, 0, 2, 1).contiguous()  # [D, N, T, H]: what is left to store of each channel
    scales, minimums = (t.expand(x.shape).permute(3, 0, 2, 1) for t in (scale, minimum))
    passed = feedback.to(x).permute(1, 2, 0)[:, :, None, None]  # [D, D, 1, 1, H]
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=x.device)
    for channel in range(x.shape[-1]):
        value = rest[channel]
        codes[channel] = quantize(value, scale=scales[channel], minimum=minimums[channel], bits=bits)
        error = value - dequantize(codes[channel], scale=scales[channel], minimum=minimums[channel])
        rest[channel + 1 :].sub_(passed[channel, channel + 1 :] * error)
    return codes.permute(1, 3, 2, 0).contiguous()


def dequantize(codes: Tensor, *, scale: Tensor, minimum: Tensor) -> Tensor:
    """Return `code * scale + minimum`, float32 `[..., T, D]`."""
    return codes.to(torch.float32).mul_(scale).add_(minimum)
