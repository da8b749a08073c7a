"""A method: a named way to fill a format.

Its stages are pins -> rotation -> token scale -> grouping -> grid -> codes.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from occamkv.errors import UnsupportedFormat, UnsupportedInput
from occamkv.formats.format import PAGE_TOKENS, Format, check_head_dim
from occamkv.methods.pinning import Pinning, pinning, pins_text

if TYPE_CHECKING:
    from torch import Tensor

    from occamkv.formats.pages import Pages
    from occamkv.methods.crossing import Crossing, Statistics
    from occamkv.ops.rope import KeyBias

_DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
_CHOICES = {
    "k_rotation": ("none", "hadamard", "balanced", "random"),
    "v_rotation": ("none", "hadamard", "random"),
    "grid": ("minmax", "paper", "unbiased"),
    "norm": ("l2", "sinkhorn"),
    "feedback": (False, True),
    "flush": ("block", "rolling"),
    "key_bias": ("keep", "remove"),
}
_BUDGETS = (2.2, 4.7)
_LEAST_WINDOW = 2 * PAGE_TOKENS


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
            later ones that the norm rules of `ops.outliers` find; "detected", only such; "lowest:N", the N tokens with
            the lowest K norm among the first that are due; "at:0,7,130" (or a list of numbers), these positions.
        window: Keep only the pins and so many of the newest tokens, at least; older ones are dropped, page by page, and
            the pins move along (StreamingLLM, arXiv:2309.17453). None keeps all.
        key_bias: "remove": what a model adds to all keys alike, before it embeds positions, is taken out of K and put
            back into the logits (`ops.rope.KeyBias`). "keep" stores K as it is.
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
    window: int | None = None
    key_bias: Literal["keep", "remove"] = "keep"
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
        object.__setattr__(self, "pins", pins_text(self.pins))
        pinning(self.pins)
        if self.window is not None and not (type(self.window) is int and self.window >= _LEAST_WINDOW):
            raise UnsupportedFormat(
                f"window is {self.window!r}; allowed: a number of tokens, at least {_LEAST_WINDOW}, or None (keep all)."
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
    def pinning(self) -> Pinning:
        """Which tokens are pinned."""
        return pinning(self.pins)

    @property
    def pinned_tokens(self) -> int:
        """How many tokens of a sequence are pinned because of their place."""
        return len(self.pinning.positions)

    @property
    def finds_pins(self) -> bool:
        """Whether tokens may be pinned because of what they are."""
        return self.pinning.finds

    @property
    def flush_tokens(self) -> int:
        """How many tokens leave the residual at a time."""
        return PAGE_TOKENS if self.flush == "block" else self.packed_format.record_tokens

    @property
    def residual_tokens(self) -> int:
        """How many tokens the residual has room for; tokens that were judged wait there until a record is full."""
        return PAGE_TOKENS + (self.flush_tokens if self.pinning.judges else 0)

    @property
    def pin_slots(self) -> int:
        """How many pins there is room for from the start; more is made where more are found."""
        return len(self.pinning.positions) + self.pinning.lowest

    @property
    def packing_starts(self) -> int:
        """Number of tokens at which the first group of a sequence is packed."""
        return self.pinning.place_of(PAGE_TOKENS + self.pinning.lowest - 1) + 1

    @property
    def needs_model(self) -> bool:
        """Whether the method cannot do without the statistics of a model's queries and keys."""
        return self.k_rotation == "balanced" or self.feedback

    def dropped_tokens(self, packed: int) -> int:
        """Return how many of the tokens packed so far lie behind the window, in whole pages.

        `window` newest tokens at least stay, counting those that the residual always holds.
        """
        if self.window is None:
            return 0
        held = PAGE_TOKENS - self.flush_tokens
        return max(0, packed + held - self.window) // PAGE_TOKENS * PAGE_TOKENS

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
        """Return how many of `tokens` tokens were packed once everything due has been packed, if no pin is found.

        Tokens that have left the window are among them.
        """
        rest = max(0, tokens - self.pinning.before(tokens) - self.pinning.lowest)
        if self.format is None or rest < PAGE_TOKENS:
            return 0
        return ((rest - PAGE_TOKENS) // self.flush_tokens + 1) * self.flush_tokens

    def held_tokens(self, tokens: int) -> int:
        """Return how many of them have not left the window."""
        packed = self.packed_tokens(tokens)
        return packed - self.dropped_tokens(packed) if packed else 0

    def nbytes(self, tokens: int, *, kv_heads: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Return the bytes that one layer allocates for one sequence of `tokens` tokens, residual and pins included.

        Room for pins that are found (`+found`, `detected`) is not foretold.
        """
        return sum(self.parts(tokens, kv_heads=kv_heads, head_dim=head_dim, dtype_bytes=dtype_bytes).values())

    def parts(self, tokens: int, *, kv_heads: int, head_dim: int, dtype_bytes: int = 2) -> dict[str, int]:
        """Return `nbytes` by what takes them: `packed` (records, norms, super-scales), `residual`, `pins`."""
        per_token = 2 * kv_heads * head_dim * dtype_bytes
        if self.format is None:
            return {"packed": 0, "residual": tokens * per_token, "pins": 0}
        pages = -(-self.held_tokens(tokens) // PAGE_TOKENS)
        return {
            "packed": pages * self.format.page_bytes(kv_heads=kv_heads, head_dim=head_dim),
            "residual": self.residual_tokens * per_token,
            "pins": self.pin_slots * per_token,
        }

    def encode(
        self,
        k: Tensor,
        v: Tensor,
        *,
        balance: Tensor | None = None,
        moment: Tensor | None = None,
        key_bias: KeyBias | None = None,
    ) -> Encoded:
        """Quantize and pack whole pages, positions 0 to T - 1. No token is pinned.

        Args:
            k: `[B, H, T, D]` in model space (post-RoPE), any float dtype, T a multiple of 128.
            v: The same shape.
            balance: d, `[H, D]`, for `k_rotation="balanced"`. Without it d = 1, with a warning.
            moment: Second moment of the queries, `[H, D, D]`, for error feedback.
            key_bias: What is taken out of K, for methods that remove it.

        Returns:
            The packed bytes; `decode` reads them back.

        Raises:
            UnsupportedInput: Shape, dtype or values are not allowed.
            UnsupportedFormat: The head_dim cannot be stored, or this is `full`.
        """
        import torch

        from occamkv.formats import records
        from occamkv.formats.pages import Pages
        from occamkv.methods.crossing import Statistics

        format = self.packed_format
        check_kv(k, v, multiple=PAGE_TOKENS)
        check_finite(k, v)
        if self.k_rotation == "balanced" and balance is None:
            warnings.warn(f"{self} was given no balance vector; d = 1 (a plain Hadamard rotation).", stacklevel=2)
        if moment is not None and balance is None:
            balance = k.new_ones(k.shape[1], k.shape[3])
        cross = self.crossing(k, Statistics(balance, moment, key_bias))
        batch, heads, tokens, head_dim = k.shape
        at = torch.arange(tokens, device=k.device).expand(batch, -1)
        packed = records.encode(
            *(records.to_groups(x, format.record_tokens) for x in cross.enter(k, v, at)),
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
        import torch

        from occamkv.formats import records

        k, v = (records.from_groups(t, encoded.batch) for t in records.decode_pages(encoded.pages))
        at = torch.arange(k.shape[2], device=k.device).expand(encoded.batch, -1)
        k, v = encoded.crossing.leave(k, v, at)
        return k.to(encoded.dtype), v.to(encoded.dtype)

    def crossing(self, k: Tensor, statistics: Statistics | None) -> Crossing:
        """Return how a layer whose K looks like `k`, `[B, H, T, D]`, crosses between model space and cache space.

        Raises:
            UnsupportedInput: The statistics do not fit, are not used by this method, or error feedback lacks them.
        """
        from occamkv.methods.crossing import Crossing, Statistics, random_signs

        heads, head_dim = k.shape[1], k.shape[3]
        k_block, v_block = self.hadamard_blocks(head_dim)
        own = Statistics() if statistics is None else statistics
        if own.balance is not None and not self.needs_model:
            raise UnsupportedInput(
                f"balance was given, but {self} has k_rotation={self.k_rotation!r} and would not use it. "
                "Leave it out, or override k_rotation='balanced'."
            )
        own.check(heads, head_dim)
        vector, feedback, signs = None, None, random_signs(head_dim).to(k.device)
        balanced = self.k_rotation == "balanced"
        if balanced and own.balance is not None:
            vector = own.balance.to(k.device).float()
        if self.k_rotation == "random":
            vector = signs.expand(heads, -1)
        if self.feedback:
            feedback = own.feedback(hadamard_block=k_block, balanced=balanced, device=k.device)
            if feedback is None:
                raise UnsupportedInput(
                    f"{self} encodes with error feedback and needs the second moment of the queries. "
                    "Pass the model, which has it, not its configuration."
                )
        bias = own.key_bias if self.key_bias == "remove" else None
        if bias is not None:
            bias = dataclasses.replace(bias, vector=bias.vector.to(k.device))
        return Crossing(k_block, v_block, vector, signs if self.v_rotation == "random" else None, feedback, bias)

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
    """Raise unless K and V are `[B, H, T, D]` float tensors of one shape, dtype and device.

    Raises:
        UnsupportedInput: Shape, dtype or device are not allowed.
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


def check_finite(k: Tensor, v: Tensor) -> None:
    """Raise `UnsupportedInput` unless all values of K and V are finite. A GPU is waited for."""
    for name, x in (("K", k), ("V", v)):
        if not bool(x.isfinite().all()):
            bad = x.isfinite().logical_not()
            raise UnsupportedInput(
                f"{name} holds {int(bad.sum())} NaN or infinite values (first at [b, h, t, d] = "
                f"{bad.nonzero()[0].tolist()}). Nothing was stored. Look at the model's dtype or its inputs."
            )
