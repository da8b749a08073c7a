"""A method: a named way to fill a format.

Its stages are pins -> rotation -> token scale -> grouping -> grid -> codes.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from occamkv.errors import UnsupportedFormat, UnsupportedInput
from occamkv.formats.format import PAGE_TOKENS, Format, check_head_dim

if TYPE_CHECKING:
    from torch import Tensor

    from occamkv.formats.pages import Pages

_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
_CHOICES = {
    "k_rotation": ("none", "hadamard", "balanced"),
    "v_rotation": ("none", "hadamard"),
    "grid": ("minmax", "paper"),
    "flush": ("block", "rolling"),
}


@dataclass(frozen=True)
class Method:
    """How K and V of one layer are stored. Frozen: change a field with `dataclasses.replace` or `with_overrides`.

    Args:
        name: Base name, as in the registry.
        format: The bytes it fills, or None for `full` (not quantized).
        k_rotation: "none", "hadamard" (per head, on post-RoPE K and Q) or "balanced" (`H(d * k)`, `H(q / d)`).
        v_rotation: "none" or "hadamard".
        grid: "minmax" or "paper" (rounded integer zero point).
        clip: Share of a group's range that the codes span, 0 < clip <= 1.
        flush: "block": 128 tokens leave the residual at a time. "rolling": only the oldest group does.
        pins: "none" or "first:N": the first N tokens of each sequence stay in full precision.
        source: The paper, for tables and reports.

    Raises:
        UnsupportedFormat: A value is not allowed.
    """

    name: str
    format: Format | None
    k_rotation: Literal["none", "hadamard", "balanced"] = "none"
    v_rotation: Literal["none", "hadamard"] = "none"
    grid: Literal["minmax", "paper"] = "minmax"
    clip: float = 1.0
    flush: Literal["block", "rolling"] = "block"
    pins: str = "none"
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse values that no method can have."""
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                raise UnsupportedFormat(f"{field} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")
        if not (isinstance(self.clip, (int, float)) and 0 < self.clip <= 1):
            raise UnsupportedFormat(f"clip is {self.clip!r}; allowed: above 0, at most 1 (1 keeps the whole range).")
        if not (isinstance(self.pins, str) and re.fullmatch(r"none|first:[0-9]{1,4}", self.pins)):
            raise UnsupportedFormat(f"pins is {self.pins!r}; allowed: 'none' or 'first:N', for example 'first:4'.")

    def __str__(self) -> str:
        """The name that parses back, such as `oscar_k3v2_g128`."""
        from occamkv.methods.names import format_name

        return format_name(self)

    @property
    def packed_format(self) -> Format:
        """The format; `full` has none and raises `UnsupportedFormat`."""
        if self.format is None:
            raise UnsupportedFormat("method 'full' keeps K and V as they are and has no packed format.")
        return self.format

    @property
    def pinned_tokens(self) -> int:
        """How many first tokens of a sequence are pinned."""
        return 0 if self.pins == "none" else int(self.pins[6:])

    def with_overrides(self, **overrides: Any) -> Method:
        """Return a copy with other field values; fields of the format may be named directly.

        Raises:
            UnsupportedFormat: A field does not exist or its value is not allowed.
        """
        format_fields = {f.name for f in dataclasses.fields(Format)}
        own_fields = {f.name for f in dataclasses.fields(Method)} - {"name", "format", "source"}
        unknown = sorted(set(overrides) - format_fields - own_fields)
        if unknown:
            from occamkv.methods.names import nearest

            allowed = sorted(format_fields | own_fields)
            raise UnsupportedFormat(
                f"method has no field {unknown[0]!r}{nearest(unknown[0], allowed)} Fields: {', '.join(allowed)}."
            )
        of_format = {k: v for k, v in overrides.items() if k in format_fields}
        own = {k: v for k, v in overrides.items() if k in own_fields}
        if of_format:
            own["format"] = dataclasses.replace(self.packed_format, **of_format)
        return dataclasses.replace(self, **own)

    def bits_per_value(self, *, kv_heads: int, head_dim: int, tokens: int | None = None, dtype_bytes: int = 2) -> float:
        """Return the mean bits of one K or V value: codes, scales, minimums, norms, super-scales.

        With `tokens` the whole cache of one sequence of that length is counted: pages as they are allocated, the
        residual buffer and the pins in a dtype of `dtype_bytes` bytes.
        """
        if self.format is None:
            return 8.0 * dtype_bytes
        if tokens is None:
            return self.format.bits_per_value(kv_heads=kv_heads, head_dim=head_dim)
        size = self.nbytes(tokens, kv_heads=kv_heads, head_dim=head_dim, dtype_bytes=dtype_bytes)
        return 8 * size / (2 * tokens * kv_heads * head_dim) if tokens else 0.0

    def packed_tokens(self, tokens: int) -> int:
        """Return how many of `tokens` tokens are packed once everything due has been packed."""
        rest = max(0, tokens - self.pinned_tokens)
        if self.format is None or rest < PAGE_TOKENS:
            return 0
        step = PAGE_TOKENS if self.flush == "block" else self.format.record_tokens
        return ((rest - PAGE_TOKENS) // step + 1) * step

    def nbytes(self, tokens: int, *, kv_heads: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Return the bytes that one layer allocates for one sequence of `tokens` tokens, residual and pins included."""
        per_token = 2 * kv_heads * head_dim * dtype_bytes
        if self.format is None:
            return tokens * per_token
        pages = -(-self.packed_tokens(tokens) // PAGE_TOKENS)
        packed = pages * self.format.page_bytes(kv_heads=kv_heads, head_dim=head_dim)
        return packed + (PAGE_TOKENS + self.pinned_tokens) * per_token

    def encode(self, k: Tensor, v: Tensor, *, balance: Tensor | None = None) -> Encoded:
        """Quantize and pack whole pages.

        Args:
            k: `[B, H, T, D]` in model space (post-RoPE), any float dtype, T a multiple of 128.
            v: The same shape.
            balance: d, `[H, D]`, for `k_rotation="balanced"`. Without it d = 1, with a warning.

        Returns:
            The packed bytes; `decode` reads them back.

        Raises:
            UnsupportedInput: Shape, dtype or values are not allowed.
            UnsupportedFormat: The head_dim cannot be stored, or this is `full`.
        """
        from occamkv.formats import records
        from occamkv.formats.pages import Pages
        from occamkv.ops import rotate

        format = self.packed_format
        check_kv(k, v, multiple=PAGE_TOKENS)
        balance = checked_balance(self, balance, k)
        k_block, v_block = self.hadamard_blocks(k.shape[-1])
        batch, heads, tokens, head_dim = k.shape
        packed = records.encode(
            records.to_groups(rotate(k, hadamard_block=k_block, balance=balance), format.record_tokens),
            records.to_groups(rotate(v, hadamard_block=v_block), format.record_tokens),
            format=format,
            grid=self.grid,
            clip=self.clip,
        )
        pages = Pages.empty(
            batch * tokens // PAGE_TOKENS, format=format, kv_heads=heads, head_dim=head_dim, device=k.device
        )
        page, slot = records.places(pages)
        records.write(pages, packed, page=page, slot=slot)
        return Encoded(self, pages, batch, k.dtype, balance)

    def decode(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return K and V of `encode` as stored: `[B, H, T, D]` in model space and in the dtype that was given."""
        from occamkv.formats import records
        from occamkv.ops import rotate_back

        pages = encoded.pages
        k_block, v_block = encoded.method.hadamard_blocks(pages.head_dim)
        k, v = (records.from_groups(t, encoded.batch) for t in records.decode_pages(pages))
        k = rotate_back(k, hadamard_block=k_block, balance=encoded.balance)
        return k.to(encoded.dtype), rotate_back(v, hadamard_block=v_block).to(encoded.dtype)

    def hadamard_blocks(self, head_dim: int) -> tuple[int | None, int | None]:
        """Return the Hadamard block sizes of K and V; None where nothing is rotated."""
        block = head_dim & -head_dim
        return (None if self.k_rotation == "none" else block), (None if self.v_rotation == "none" else block)


@dataclass(frozen=True)
class Encoded:
    """What `Method.encode` made: pages `[B * T / 128]`, sequence after sequence, and what is needed to read them."""

    method: Method
    pages: Pages
    batch: int
    dtype: Any
    balance: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held, the balance vector included."""
        return self.pages.nbytes + (0 if self.balance is None else self.balance.nbytes)


def check_kv(k: Tensor, v: Tensor, *, multiple: int = 1) -> None:
    """Raise unless K and V are `[B, H, T, D]` float tensors of one shape, dtype and device, with finite values.

    Raises:
        UnsupportedInput: Shape, dtype, device or values are not allowed.
        UnsupportedFormat: The head_dim cannot be stored.
    """
    given = f"K {tuple(k.shape)} {k.dtype} on {k.device}, V {tuple(v.shape)} {v.dtype} on {v.device}"
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
        raise UnsupportedInput(f"{given}; allowed: one shape [B, H, T, D], one dtype and one device for both.")
    if str(k.dtype) not in _DTYPES:
        raise UnsupportedInput(f"{given}; allowed: a floating-point dtype of {', '.join(_DTYPES)}.")
    check_head_dim(k.shape[-1])
    no_tokens = multiple > 1 and k.shape[2] == 0
    if k.shape[0] == 0 or k.shape[1] == 0 or k.shape[2] % multiple or no_tokens:
        wanted = f", T a multiple of {multiple} and not 0" if multiple > 1 else ""
        raise UnsupportedInput(f"{given}; allowed: at least one sequence and one head{wanted}.")
    for name, x in (("K", k), ("V", v)):
        if not bool(x.isfinite().all()):
            bad = x.isfinite().logical_not()
            raise UnsupportedInput(
                f"{name} holds {int(bad.sum())} NaN or infinite values (first at [b, h, t, d] = "
                f"{bad.nonzero()[0].tolist()}). Nothing was stored. Look at the model's dtype or its inputs."
            )


def checked_balance(method: Method, balance: Tensor | None, k: Tensor) -> Tensor | None:
    """Return d for K `[B, H, T, D]`, float32 on its device, or None; refuse what does not fit."""
    import torch

    if method.k_rotation != "balanced":
        if balance is not None:
            raise UnsupportedInput(
                f"balance was given, but {method} has k_rotation={method.k_rotation!r} and would not use it. "
                "Leave it out, or override k_rotation='balanced'."
            )
        return None
    if balance is None:
        warnings.warn(f"{method} was given no balance vector; d = 1 (a plain Hadamard rotation).", stacklevel=3)
        return None
    if balance.shape != (k.shape[1], k.shape[3]) or not bool((balance.isfinite() & (balance > 0)).all()):
        raise UnsupportedInput(
            f"balance has shape {tuple(balance.shape)}; allowed: finite values above 0, shape "
            f"[H, D] = {(k.shape[1], k.shape[3])}."
        )
    return balance.to(device=k.device, dtype=torch.float32)
