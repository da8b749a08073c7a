"""A slow, independent reader of records: numpy and float64, straight from the documented layout, no occamkv code.

A record is `k_codes | k_scale | k_minimum | v_codes | v_scale | v_minimum`. Codes are token-major `[G][padded D]` bit
planes; metadata is `[padded D]` for per-channel groups and `[G][groups]` for per-token groups; all little-endian.
With 2.5 bits all tokens of the first half of the padded channels come first, in 3 bits, then the second half in 2.
With Lloyd-Max levels the scale is a root mean square and there is no minimum.
"""

from typing import NamedTuple

import numpy as np

PLANE_WIDTHS = {2: (2,), 3: (2, 1), 4: (2, 2)}

# The upper half of the Lloyd-Max levels of the unit normal: Newton's method with 40 digits on Max's equations (1960).
UPPER_LEVELS = {
    2: (0.452780034636, 1.5104176085),
    3: (0.245094178944, 0.756005281206, 1.3439092785, 2.15194570454),
    4: (
        *(0.128395029851, 0.38804829949, 0.656759118532, 0.942340456487),
        *(1.25623119735, 1.61804638602, 2.06901722653, 2.732589571),
    ),
}
LEVELS = {
    bits: np.array([*(-x for x in reversed(upper)), *upper]).astype(np.float32).astype(np.float64)
    for bits, upper in UPPER_LEVELS.items()
}


class Side(NamedTuple):
    """K or V of a record: where its bytes lie and how they group."""

    bits: float
    per_channel: bool
    group: int
    tokens: int
    head_dim: int
    width: int
    meta_bytes: int
    lloyd: bool

    @property
    def runs(self) -> list[tuple[int, slice]]:
        """Bits of a code, and the padded channels that have so many."""
        half = self.width // 2
        return [(3, slice(0, half)), (2, slice(half, self.width))] if self.bits == 2.5 else [(self.bits, slice(None))]

    @property
    def groups(self) -> int:
        """Groups that metadata is stored for."""
        return self.width if self.per_channel else self.tokens * self.groups_per_token

    @property
    def groups_per_token(self) -> int:
        return -(-self.head_dim // self.group)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of codes, scale and minimum."""
        codes = self.tokens * self.width * self.bits / 8
        assert codes == int(codes)
        return int(codes), self.groups * self.meta_bytes, 0 if self.lloyd else self.groups * self.meta_bytes

    def group_of(self) -> np.ndarray:
        """Number of the group of each value, int [tokens, head_dim]."""
        token, channel = np.mgrid[: self.tokens, : self.head_dim]
        return channel if self.per_channel else token * self.groups_per_token + channel // self.group

    def meaning(self, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        """What codes [tokens, width] stand for, float64 [tokens, head_dim]; NaN where there is no such code."""
        codes, group = codes[:, : self.head_dim], self.group_of()
        most = np.zeros(self.width, dtype=np.int64)
        for bits, channels in self.runs:
            most[channels] = bits
        most = most[: self.head_dim]
        if not self.lloyd:
            return np.where(codes < 2**most, codes * scale[group] + minimum[group], np.nan)
        table = np.full((5, 16), np.nan)
        for bits, levels in LEVELS.items():
            table[bits, : 2**bits] = levels
        return table[most, codes] * scale[group]


def sides(format, head_dim: int) -> tuple[Side, Side]:
    """K and V of a format; only its plain fields are read."""
    per_channel = format.k_axis == "channel"
    tokens = format.k_group if per_channel else 32
    shared = {
        "tokens": tokens,
        "head_dim": head_dim,
        "width": (head_dim + 31) // 32 * 32,
        "meta_bytes": format.metadata_bits // 8,
        "lloyd": format.levels == "lloyd",
    }
    k = Side(format.k_bits, per_channel, min(format.k_group, head_dim), **shared)
    return k, Side(format.v_bits, False, min(format.v_group, head_dim), **shared)


def e4m3(byte: int) -> float:
    """One float8 e4m3fn by its definition."""
    sign, exponent, mantissa = (-1.0 if byte & 0x80 else 1.0), (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([e4m3(b) for b in range(256)])


def read_codes(raw: np.ndarray, side: Side) -> np.ndarray:
    """Codes of one side, int [tokens, width]: value = sum of plane * weight."""
    codes = np.zeros((side.tokens, side.width), dtype=np.int64)
    start = 0
    for bits, channels in side.runs:
        run, first_bit = codes[:, channels], 0
        for plane_width in PLANE_WIDTHS[bits]:
            size = run.size * plane_width // 8
            bit = np.unpackbits(raw[start : start + size], bitorder="little").reshape(*run.shape, plane_width)
            for j in range(plane_width):
                run += bit[..., j].astype(np.int64) << (first_bit + j)
            start, first_bit = start + size, first_bit + plane_width
    return codes


def read_metadata(scale: np.ndarray, minimum: np.ndarray, super_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum of each group in float64; the minimum is 0 where none is stored."""
    if not minimum.size:
        return scale.view("<f2").astype(np.float64), np.zeros(scale.size // 2)
    if super_scale is None:
        return scale.view("<f2").astype(np.float64), minimum.view("<f2").astype(np.float64)
    wide = E4M3[scale] * super_scale
    return wide, minimum.view(np.int8) * (wide / 16)


class SlowSide(NamedTuple):
    """What one side of a record says: codes [tokens, width], metadata per group, values [tokens, head_dim]."""

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray
    values: np.ndarray


def read_side(raw: np.ndarray, side: Side, super_scale: float | None) -> SlowSide:
    """Read the three sections of one side. `code * scale` is exact in float32, so values are rounded once."""
    codes_end, scale_end = side.sizes[0], side.sizes[0] + side.sizes[1]
    codes = read_codes(raw[:codes_end], side)
    scale, minimum = read_metadata(raw[codes_end:scale_end], raw[scale_end:], super_scale)
    return SlowSide(codes, scale, minimum, side.meaning(codes, scale, minimum).astype(np.float32))


def read_record(raw: np.ndarray, format, head_dim: int, supers: np.ndarray | None) -> tuple[SlowSide, SlowSide]:
    """Read one record, uint8 [bytes]; K is still divided by its token norm."""
    k, v = sides(format, head_dim)
    k_bytes = sum(k.sizes)
    assert raw.size == k_bytes + sum(v.sizes), "a record is exactly its six sections"
    k_super, v_super = (None, None) if supers is None else supers.astype(np.float64)
    return read_side(raw[:k_bytes], k, k_super), read_side(raw[k_bytes:], v, v_super)


def decode(records, format, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V, float32 [N, H, G, D], of a `Records` tuple (data, norms, super_scales)."""
    data = records.data.numpy()
    norms = None if records.norms is None else records.norms.numpy().astype(np.float64)
    supers = None if records.super_scales is None else records.super_scales.numpy()
    tokens = sides(format, head_dim)[0].tokens
    k = np.zeros((*data.shape[:2], tokens, head_dim), dtype=np.float32)
    v = np.zeros_like(k)
    for n, h in np.ndindex(*data.shape[:2]):
        of_k, of_v = read_record(data[n, h], format, head_dim, None if supers is None else supers[n, h])
        k[n, h] = of_k.values if norms is None else of_k.values * norms[n][:, None]
        v[n, h] = of_v.values
    return k, v
