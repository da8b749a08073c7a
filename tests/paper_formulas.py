"""The published quantizers, written from their formulas in float64, and the checks that compare occamkv with them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from occamkv import Method
from occamkv.ops import apply_grid, dequantize, group_range, quantize, round_metadata, spread

TIE = 1e-4  # a quotient this close to .5 may be rounded either way by float32


class Coded(NamedTuple):
    """Codes and reconstruction; `clear` marks the values that are no rounding tie (None: all)."""

    codes: Tensor
    values: Tensor
    clear: Tensor | None = None


def some_kv(heads: int, head_dim: int, *, batch: int = 1, tokens: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys with loud channels, offsets and unequal token norms (the first token weak, as a sink is); plainer values."""
    generator = np.random.default_rng(1000 * heads + head_dim + seed)
    shape = (batch, heads, tokens, head_dim)
    k = generator.standard_normal(shape) * np.exp(0.6 * generator.standard_normal((1, heads, 1, head_dim)))
    k = (k + generator.standard_normal((1, heads, 1, head_dim))) * np.exp(
        0.3 * generator.standard_normal((batch, heads, tokens, 1))
    )
    k[:, :, 0] *= 0.3
    v = generator.standard_normal(shape) * np.exp(0.5 * generator.standard_normal((batch, heads, tokens, 1)))
    return torch.from_numpy(k.astype(np.float32)), torch.from_numpy(v.astype(np.float32))


def sylvester(head_dim: int) -> Tensor:
    """Orthonormal Hadamard matrix, float64, for powers of two: H(2n) = [[H, H], [H, -H]] / sqrt(2)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < head_dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix


def rotated(x: Tensor) -> Tensor:
    """x H in float64; H is symmetric and its own inverse."""
    return x.double() @ sylvester(x.shape[-1])


def distance_from_tie(quotient: Tensor) -> Tensor:
    return (quotient - quotient.floor() - 0.5).abs()


def paper_quantizer(x: Tensor, bits: int, dim: int) -> Coded:
    """arXiv:2605.19660: delta = (max - min) / (2^b - 1), z = round(-min / delta), q = clamp(round(x / delta) + z)."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    delta = (high - low) / (2**bits - 1)
    zero = torch.round(-low / delta)
    codes = (torch.round(x / delta) + zero).clamp(0, 2**bits - 1)
    clear = (distance_from_tie(x / delta) > TIE) & (distance_from_tie(-low / delta) > TIE)
    return Coded(codes, (codes - zero) * delta, clear)


def minmax_quantizer(x: Tensor, bits: int, dim: int) -> Coded:
    """KIVI and the plain baselines: q = round((x - min) / delta), x ~ q delta + min."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    delta = (high - low) / (2**bits - 1)
    quotient = (x - low) / delta
    codes = torch.round(quotient)
    return Coded(codes, codes * delta + low, distance_from_tie(quotient) > TIE)


def clipped_quantizer(share: float) -> Callable[[Tensor, int, int], Coded]:
    """The min-max quantizer of `share` of the range around its middle; what lies outside takes the nearest end."""

    def quantizer(x: Tensor, bits: int, dim: int) -> Coded:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        delta = share * (high - low) / (2**bits - 1)
        start = (low + high - share * (high - low)) / 2
        quotient = (x - start) / delta
        codes = torch.round(quotient).clamp(0, 2**bits - 1)
        return Coded(codes, codes * delta + start, distance_from_tie(quotient) > TIE)

    return quantizer


def unbiased_quantizer(share: float) -> Callable[[Tensor, int, int], Coded]:
    """`clipped_quantizer`, then with the step at which its codes, as numbers, have slope 1 on x (twice at most)."""

    def quantizer(x: Tensor, bits: int, dim: int) -> Coded:
        first = clipped_quantizer(share)(x, bits, dim)
        delta = share * (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)
        mean, middle = x.mean(dim, keepdim=True), first.codes.mean(dim, keepdim=True)
        together = ((x - mean) * (first.codes - middle)).sum(dim, keepdim=True)
        wider = torch.minimum((x - mean).square().sum(dim, keepdim=True) / together, 2 * delta)
        start = mean - wider * middle
        quotient = (x - start) / wider
        codes = torch.round(quotient).clamp(0, 2**bits - 1)
        clear = first.clear & (distance_from_tie(quotient) > TIE)
        return Coded(codes, codes * wider + start, clear)

    return quantizer


def slow_sinkhorn(k: np.ndarray) -> np.ndarray:
    """After arXiv:2606.03458: eight rounds over channels and tokens of one group `[H, G, D]`, float64, as loops."""
    columns = k.transpose(1, 0, 2).reshape(k.shape[1], -1).astype(np.float64).copy()
    original, product = columns.copy(), np.ones(len(columns))
    for _ in range(8):
        for c in range(columns.shape[1]):
            columns[:, c] /= columns[:, c].std(ddof=1) or 1.0
        for t in range(len(columns)):
            divisor = np.sqrt((columns[t] ** 2).mean()) or 1.0
            columns[t] /= divisor
            product[t] *= divisor
    return product / product.max() * np.sqrt((original**2).sum(1)).max()


def per_channel(quantizer, x: Tensor, bits: int, tokens: int) -> Coded:
    """One group per channel over `tokens` tokens of x, [B, H, T, D]."""
    coded = quantizer(x.unflatten(2, (-1, tokens)), bits, 3)
    return Coded(*(t.flatten(2, 3) for t in coded))


def per_token(quantizer, x: Tensor, bits: int, channels: int) -> Coded:
    """Runs of `channels` channels of each token."""
    coded = quantizer(x.unflatten(3, (-1, channels)), bits, 4)
    return Coded(*(t.flatten(3, 4) for t in coded))


def by_ops(x: Tensor, *, bits: int, axis: str, group: int, grid: str) -> Coded:
    """The same step made of occamkv's own ops, before any metadata is rounded. x: float32 [B, H, T, D]."""
    groups = x.unflatten(2, (-1, group if axis == "channel" else 32))
    low, high = apply_grid(*group_range(groups, axis=axis, group=group), bits=bits, grid=grid)
    meta = round_metadata(low, high, bits=bits, metadata_bits=32)
    wide = {"axis": axis, "group": group, "head_dim": x.shape[-1]}
    scale, minimum = spread(meta.scale, **wide), spread(meta.minimum, **wide)
    codes = quantize(groups, scale=scale, minimum=minimum, bits=bits)
    values = dequantize(codes, scale=scale, minimum=minimum)
    return Coded(codes.flatten(2, 3), values.flatten(2, 3))


def assert_same_codes_and_values(ours: Coded, truth: Coded) -> None:
    """Codes equal except at ties, reconstruction within 1e-5."""
    clear = truth.clear
    assert clear.double().mean() > 0.97, "ties are rare"
    assert torch.equal(ours.codes.double()[clear], truth.codes[clear])
    difference = (ours.values.double() - truth.values)[clear].norm() / truth.values[clear].norm()
    assert difference < 1e-5


def relative_error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact.double()).norm() / exact.double().norm())


def assert_error_is_that_of_the_formula(
    method: Method, given: tuple[Tensor, Tensor], formula: tuple[Tensor, Tensor], within: float = 0.005
) -> None:
    """Encode and decode with float16 metadata; the error on K and on V stays within `within` of the formula's."""
    stored = method.decode(method.encode(*given))
    for name, x, got, truth in zip("KV", given, stored, formula, strict=True):
        ratio = relative_error(got, x) / relative_error(truth, x)
        assert abs(ratio - 1) < within, f"error of {name} is {ratio:.4f} times the formula's"
