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
    from occamkv.methods.crossing import Crossing, Statistics

_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
_CHOICES = {
    "k_rotation": ("none", "hadamard", "balanced", "random"),
    "v_rotation": ("none", "hadamard", "random"),
    "grid": ("minmax", "paper", "unbiased"),
    "norm": ("l2", "sinkhorn"),
    "feedback": (False, True),
    "flush": ("block", "rolling"),
}
_BUDGETS = (2.2, 4.7)
_PINS = re.compile(r"none|first:(?P<first>[0-9]{1,4})(?P<found>\+found)?|lowest:(?P<lowest>[0-9]{1,4})")


@dataclass(frozen=True)
class Method:
    """How K and V of one layer are stored. Frozen: change a field with `dataclasses.replace` or `with_overrides`.

    Args:
        name: Base name, as in the registry.
        format: The bytes it fills, or None for `full` (not quantized).
        k_rotation: "none", "hadamard" (per head, on post-RoPE K and Q), "balanced" (`H(d * k)`, `H(q / d)`, see
            `ops.balance`) or "random" (fixed random signs, then Hadamard).
        v_rotation: "none", "hadamard" or "random".
        grid: "minmax", "paper" (rounded integer zero point) or "unbiased" (clipped, then refitted to slope 1).
        clip: Share of a group's range that the codes span, 0 < clip <= 1; None takes what suits bits and group.
        norm: The token norm, where the format has one: "l2" or "sinkhorn", see `ops.norms`.
        feedback: Choose K's codes with error feedback, weighted by the second moment of the queries.
        flush: "block": 128 tokens leave the residual at a time. "rolling": only the oldest group does.
        pins: Tokens of each sequence that stay in full precision: "none"; "first:N", the first N; "first:N+found", also
            later ones that the norm rules of `ops.outliers` find; "lowest:N", the N tokens with the lowest K norm among
            the first that are due.
        budget: Mean bits per value that codes, groups and rotation are chosen for, layer by layer, when the first
            tokens are due (`methods.auto`); None for methods that say them.
        source: The paper, for tables and reports.

    Raises:
        UnsupportedFormat: A value is not allowed.
    """

    name: str
    format: Format | None
    k_rotation: Literal["none", "hadamard", "balanced", "random"] = "none"
    v_rotation: Literal["none", "hadamard", "random"] = "none"
    grid: Literal["minmax", "paper", "unbiased"] = "minmax"
    clip: float | None = 1.0
    norm: Literal["l2", "sinkhorn"] = "l2"
    feedback: bool = False
    flush: Literal["block", "rolling"] = "block"
    pins: str = "none"
    budget: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse values that no method can have."""
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if (type(value), value) not in [(type(one), one) for one in allowed]:
                raise UnsupportedFormat(f"{field} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")
        if self.clip is not None and not (type(self.clip) in (int, float) and 0 < self.clip <= 1):
            raise UnsupportedFormat(
                f"clip is {self.clip!r}; allowed: above 0, at most 1 (1 keeps the whole range), or None (by bits)."
            )
        if not (isinstance(self.pins, str) and _PINS.fullmatch(self.pins)):
            raise UnsupportedFormat(
                f"pins is {self.pins!r}; allowed: 'none', 'first:4', 'first:4+found' or 'lowest:5' (any numbers)."
            )
        low, high = _BUDGETS
        if self.budget is not None and not (isinstance(self.budget, (int, float)) and low <= self.budget <= high):
            raise UnsupportedFormat(
                f"budget is {self.budget!r}; allowed: {low} to {high} bits per value. Codes of 2 to 4 bits with their "
                "scales reach 2.26 to 4.26 with 8 KV heads of 128 channels, a little more with fewer or smaller ones."
            )
        if self.feedback and self.format is not None and self.format.levels == "lloyd":
            raise UnsupportedFormat("feedback is True; error feedback needs levels='uniform'.")

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
        found = _PINS.fullmatch(self.pins)
        return int(found["first"] or 0) if found else 0

    @property
    def flush_tokens(self) -> int:
        """How many tokens leave the residual at a time."""
        return PAGE_TOKENS if self.flush == "block" else self.packed_format.record_tokens

    @property
    def judges(self) -> bool:
        """Whether every token is judged by its norms before it is packed."""
        return self.pins.endswith("+found")

    @property
    def finds_pins(self) -> bool:
        """Whether later tokens may be pinned because of what they are."""
        return self.judges or self.lowest_pins > 0

    @property
    def residual_tokens(self) -> int:
        """How many tokens the residual has room for; tokens that were judged wait there until a record is full."""
        return PAGE_TOKENS + (self.flush_tokens if self.judges else 0)

    @property
    def lowest_pins(self) -> int:
        """How many tokens with the lowest K norm are pinned when the first tokens are due."""
        return int(self.pins[7:]) if self.pins.startswith("lowest:") else 0

    @property
    def needs_model(self) -> bool:
        """Whether the method needs the statistics of a model's queries and keys."""
        return self.k_rotation == "balanced" or self.feedback

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
        if overrides.get("budget") is not None and self.budget is None:
            raise UnsupportedFormat(f"method {self.name!r} has no budget: it says its bits itself. Use 'auto'.")
        of_format = {k: v for k, v in overrides.items() if k in format_fields}
        own = {k: v for k, v in overrides.items() if k in own_fields}
        if of_format:
            own["format"] = dataclasses.replace(self.packed_format, **of_format)
        return dataclasses.replace(self, **own)

    def variant(self, name: str, **overrides: Any) -> Method:
        """Return `with_overrides` under another base name, for the file of a method that builds on this one."""
        return dataclasses.replace(self.with_overrides(**overrides), name=name)

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
        """Return how many of `tokens` tokens are packed once everything due has been packed, if no pin is found."""
        rest = max(0, tokens - self.pinned_tokens - self.lowest_pins)
        if self.format is None or rest < PAGE_TOKENS:
            return 0
        return ((rest - PAGE_TOKENS) // self.flush_tokens + 1) * self.flush_tokens

    def nbytes(self, tokens: int, *, kv_heads: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Return the bytes that one layer allocates for one sequence of `tokens` tokens, residual and pins included.

        Room for pins that are found (`+found`) is not foretold.
        """
        return sum(self.parts(tokens, kv_heads=kv_heads, head_dim=head_dim, dtype_bytes=dtype_bytes).values())

    def parts(self, tokens: int, *, kv_heads: int, head_dim: int, dtype_bytes: int = 2) -> dict[str, int]:
        """Return `nbytes` by what takes them: `packed` (records, norms, super-scales), `residual`, `pins`."""
        per_token = 2 * kv_heads * head_dim * dtype_bytes
        if self.format is None:
            return {"packed": 0, "residual": tokens * per_token, "pins": 0}
        pages = -(-self.packed_tokens(tokens) // PAGE_TOKENS)
        return {
            "packed": pages * self.format.page_bytes(kv_heads=kv_heads, head_dim=head_dim),
            "residual": self.residual_tokens * per_token,
            "pins": (self.pinned_tokens + self.lowest_pins) * per_token,
        }

    def encode(self, k: Tensor, v: Tensor, *, balance: Tensor | None = None, moment: Tensor | None = None) -> Encoded:
        """Quantize and pack whole pages. No token is pinned.

        Args:
            k: `[B, H, T, D]` in model space (post-RoPE), any float dtype, T a multiple of 128.
            v: The same shape.
            balance: d, `[H, D]`, for `k_rotation="balanced"`. Without it d = 1, with a warning.
            moment: Second moment of the queries, `[H, D, D]`, for error feedback.

        Returns:
            The packed bytes; `decode` reads them back.

        Raises:
            UnsupportedInput: Shape, dtype or values are not allowed.
            UnsupportedFormat: The head_dim cannot be stored, or this is `full`.
        """
        from occamkv.formats import records
        from occamkv.formats.pages import Pages
        from occamkv.methods.crossing import Statistics

        format = self.packed_format
        check_kv(k, v, multiple=PAGE_TOKENS)
        if self.k_rotation == "balanced" and balance is None:
            warnings.warn(f"{self} was given no balance vector; d = 1 (a plain Hadamard rotation).", stacklevel=2)
        given = None
        if balance is not None or moment is not None:
            given = Statistics(k.new_ones(k.shape[1], k.shape[3]) if balance is None else balance, moment)
        cross = self.crossing(k, given)
        batch, heads, tokens, head_dim = k.shape
        packed = records.encode(
            *(records.to_groups(x, format.record_tokens) for x in cross.enter(k, v)),
            format=format,
            grid=self.grid,
            clip=self.clip,
            norm=self.norm,
            feedback=cross.feedback,
        )
        pages = Pages.empty(
            batch * tokens // PAGE_TOKENS, format=format, kv_heads=heads, head_dim=head_dim, device=k.device
        )
        page, slot = records.places(pages)
        records.write(pages, packed, page=page, slot=slot)
        return Encoded(self, pages, batch, k.dtype, cross)

    def decode(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Return K and V of `encode` as stored: `[B, H, T, D]` in model space and in the dtype that was given."""
        from occamkv.formats import records

        k, v = (records.from_groups(t, encoded.batch) for t in records.decode_pages(encoded.pages))
        k, v = encoded.crossing.leave(k, v)
        return k.to(encoded.dtype), v.to(encoded.dtype)

    def crossing(self, k: Tensor, statistics: Statistics | None) -> Crossing:
        """Return how a layer whose K looks like `k`, `[B, H, T, D]`, crosses between model space and cache space.

        Raises:
            UnsupportedInput: The statistics do not fit, are not used by this method, or error feedback lacks them.
        """
        from occamkv.methods.crossing import Crossing, random_signs

        heads, head_dim = k.shape[1], k.shape[3]
        k_block, v_block = self.hadamard_blocks(head_dim)
        if statistics is not None and not self.needs_model:
            raise UnsupportedInput(
                f"balance was given, but {self} has k_rotation={self.k_rotation!r} and would not use it. "
                "Leave it out, or override k_rotation='balanced'."
            )
        if statistics is not None:
            statistics.check(heads, head_dim)
        vector, feedback, signs = None, None, random_signs(head_dim).to(k.device)
        balanced = self.k_rotation == "balanced"
        if balanced and statistics is not None:
            vector = statistics.balance.to(k.device).float()
        if self.k_rotation == "random":
            vector = signs.expand(heads, -1)
        if self.feedback:
            if statistics is not None:
                feedback = statistics.feedback(hadamard_block=k_block, balanced=balanced, device=k.device)
            if feedback is None:
                raise UnsupportedInput(
                    f"{self} encodes with error feedback and needs the second moment of the queries. "
                    "Pass the model, which has it, not its configuration."
                )
        return Crossing(k_block, v_block, vector, signs if self.v_rotation == "random" else None, feedback)

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
    crossing: Crossing

    @property
    def nbytes(self) -> int:
        """Bytes held, the balance vector included."""
        vector = self.crossing.k_vector if self.method.k_rotation == "balanced" else None
        return self.pages.nbytes + (0 if vector is None else vector.nbytes)


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
