"""What a kernel needs to know to read a record: bits, groups, axis, token scale. Loads no torch."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from occamkv.errors import UnsupportedFormat

PAGE_TOKENS = 128
"""Tokens of a page: the unit of allocation and sharing, and the size of the residual."""

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8
_CHANNEL_ALIGNMENT = 32
_TOKEN_AXIS_RECORD = 32  # tokens of a record when K groups run along channels
_BITS = (2, 3, 4, 2.5)
_GROUPS = (32, 64, 128, 256)


def check_head_dim(head_dim: int) -> None:
    """Raise `UnsupportedFormat` unless `head_dim` is a multiple of 8 from 8 to 256."""
    if head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise UnsupportedFormat(
            f"head_dim is {head_dim}; a record holds multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}. "
            "Keep this layer in full precision (method 'full')."
        )


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if (type(value), value) not in [(type(one), one) for one in allowed]:
        raise UnsupportedFormat(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True)
class Sections:
    """Sizes in bytes of the sections of one record, in the order in which they lie."""

    k_codes: int
    k_scale: int
    k_minimum: int
    v_codes: int
    v_scale: int
    v_minimum: int

    @property
    def record_bytes(self) -> int:
        """Size of the whole record in bytes."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes in order."""
        return (self.k_codes, self.k_scale, self.k_minimum, self.v_codes, self.v_scale, self.v_minimum)


@dataclass(frozen=True)
class Format:
    """How a group of tokens of K and V becomes bytes. Bits of K and V are independent.

    Args:
        k_bits: Bits of a K code: 2, 3 or 4; with Lloyd-Max levels also 2.5 (3 for the first half of the padded
            channels, 2 for the others).
        v_bits: Bits of a V code, likewise.
        k_axis: "channel": one scale and minimum per channel over `k_group` tokens. "token": per token over runs of
            `k_group` channels.
        k_group: 32, 64 or 128 tokens ("channel"), or 32, 64, 128, 256 channels ("token"; never more than head_dim).
        v_group: Channels in a V group: 32, 64, 128, 256, never more than head_dim. V groups always run along channels.
        token_scale: Divide K by one L2 norm per token over all KV heads (arXiv:2605.19660, Omni-Token Scaling).
        norm_dtype: Stored dtype of that norm.
        metadata_bits: 16: float16 scale and minimum. 8: float8 e4m3 scale, int8 minimum in units of scale / 16.
        levels: "uniform": a code means `code * scale + minimum`. "lloyd": it means a level of the Lloyd-Max quantizer
            of the unit normal times the group's root mean square, which is the only metadata, a float16.

    Raises:
        UnsupportedFormat: A value is not allowed.
    """

    k_bits: float = 2
    v_bits: float = 2
    k_axis: Literal["channel", "token"] = "channel"
    k_group: int = 32
    v_group: int = 32
    token_scale: bool = False
    norm_dtype: Literal["float32", "float16"] = "float32"
    metadata_bits: int = 16
    levels: Literal["uniform", "lloyd"] = "uniform"

    def __post_init__(self) -> None:
        """Refuse values that no record can hold."""
        _check("k_bits", self.k_bits, _BITS)
        _check("v_bits", self.v_bits, _BITS)
        _check("k_axis", self.k_axis, ("channel", "token"))
        _check("k_group", self.k_group, _GROUPS[:3] if self.k_axis == "channel" else _GROUPS)
        _check("v_group", self.v_group, _GROUPS)
        _check("norm_dtype", self.norm_dtype, ("float32", "float16"))
        _check("metadata_bits", self.metadata_bits, (16, 8))
        _check("levels", self.levels, ("uniform", "lloyd"))
        if self.levels == "lloyd" and self.metadata_bits != 16:
            raise UnsupportedFormat(f"metadata_bits is {self.metadata_bits}; Lloyd-Max levels have 16-bit metadata.")
        if self.levels == "uniform" and 2.5 in (self.k_bits, self.v_bits):
            raise UnsupportedFormat(
                f"k_bits is {self.k_bits} and v_bits {self.v_bits}; 2.5 bits need levels='lloyd', uniform codes have "
                "2, 3 or 4 bits."
            )

    @cached_property
    def record_tokens(self) -> int:
        """Tokens in one record: the K group, or 32 when K groups run along channels."""
        return self.k_group if self.k_axis == "channel" else _TOKEN_AXIS_RECORD

    @property
    def page_records(self) -> int:
        """Records of one KV head in a page of 128 tokens."""
        return PAGE_TOKENS // self.record_tokens

    @property
    def norm_bytes(self) -> int:
        """Bytes of the token norm of one token; 0 without token scale."""
        return (4 if self.norm_dtype == "float32" else 2) if self.token_scale else 0

    def sections(self, head_dim: int) -> Sections:
        """Return the byte sizes of the sections of one record (one KV head, `record_tokens` tokens)."""
        check_head_dim(head_dim)
        width, tokens, meta = padded(head_dim), self.record_tokens, self.metadata_bits // 8
        k_groups = width if self.k_axis == "channel" else tokens * channel_groups(head_dim, self.k_group)
        v_groups = tokens * channel_groups(head_dim, self.v_group)
        minimum = meta if self.levels == "uniform" else 0
        return Sections(
            k_codes=int(tokens * width * self.k_bits) // 8,
            k_scale=k_groups * meta,
            k_minimum=k_groups * minimum,
            v_codes=int(tokens * width * self.v_bits) // 8,
            v_scale=v_groups * meta,
            v_minimum=v_groups * minimum,
        )

    def page_bytes(self, *, kv_heads: int, head_dim: int) -> int:
        """Return the bytes of one page of 128 tokens of one layer: records, token norms, super-scales."""
        supers = 2 * 2 * kv_heads * self.page_records if self.metadata_bits == 8 else 0
        records = kv_heads * self.page_records * self.sections(head_dim).record_bytes
        return records + PAGE_TOKENS * self.norm_bytes + supers

    def bits_per_value(self, *, kv_heads: int, head_dim: int) -> float:
        """Return the mean bits of one K or V value in a full page, everything counted."""
        values = 2 * PAGE_TOKENS * kv_heads * head_dim
        return 8 * self.page_bytes(kv_heads=kv_heads, head_dim=head_dim) / values


def padded(head_dim: int) -> int:
    """Return head_dim rounded up to a multiple of 32: the channels that codes and per-channel metadata cover."""
    return -(-head_dim // _CHANNEL_ALIGNMENT) * _CHANNEL_ALIGNMENT


def channel_groups(head_dim: int, group: int) -> int:
    """Return how many groups the channels of one token make; a group is never larger than head_dim."""
    return -(-head_dim // min(group, head_dim))
