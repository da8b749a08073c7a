"""Encode groups of tokens into records and read them back, in the canonical layout (docs/format.md).

Everything here is in cache space: rotation belongs to whoever calls.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats.format import PAGE_TOKENS, Format, channel_groups, padded
from occamkv.formats.pages import CANONICAL, Pages
from occamkv.ops import affine, lloyd, packing
from occamkv.ops.norms import NORMS, Norm, token_norm

_LARGEST = 65504.0  # of float16
LARGEST_TOKEN = 0.75 * _LARGEST
"""Largest value of a token that every grid can store: a rounded zero point moves a minimum by up to a third."""


class Records(NamedTuple):
    """Records of N groups of tokens.

    `data`: uint8 `[N, H, record_bytes]`; `norms`: `[N, G]` or None; `super_scales`: float16 `[N, H, 2]` or None.
    """

    data: Tensor
    norms: Tensor | None
    super_scales: Tensor | None

    def select(self, index: Tensor) -> "Records":
        """Return the records with these numbers, int64 `[n]`."""
        norms, supers = (None if t is None else t[index] for t in (self.norms, self.super_scales))
        return Records(self.data[index], norms, supers)


class _Side(NamedTuple):
    """What differs between K and V."""

    bits: float
    axis: affine.Axis
    group: int
    lloyd: bool


def _sides(format: Format, head_dim: int) -> tuple[_Side, _Side]:
    k_group = format.k_group if format.k_axis == "channel" else min(format.k_group, head_dim)
    lloyd = format.levels == "lloyd"
    return (
        _Side(format.k_bits, format.k_axis, k_group, lloyd),
        _Side(format.v_bits, "token", min(format.v_group, head_dim), lloyd),
    )


def encode(
    k: Tensor,
    v: Tensor,
    *,
    format: Format,
    grid: affine.Grid = "minmax",
    clip: float | None = 1.0,
    norm: Norm = "l2",
    feedback: Tensor | None = None,
) -> Records:
    """Quantize N groups of tokens and pack them.

    Args:
        k: `[N, H, G, D]` in cache space, float, G = `format.record_tokens`.
        v: The same shape.
        format: What to write.
        grid: How the range of a group is chosen, see `ops.affine.apply_grid` and `ops.affine.refit`.
        clip: Share of the range that is kept; None takes what suits bits and group, see `ops.affine.clip_share`.
        norm: Which token norm is divided out of K, where the format has one.
        feedback: F, `[H, D, D]`: K's codes are chosen with error feedback (`ops.affine.quantize_with_feedback`).

    Raises:
        UnsupportedInput: A value, scale or norm is not finite or does not fit its stored dtype.
    """
    head_dim = k.shape[-1]
    k, v = k.to(torch.float32), v.to(torch.float32)
    given, norms = (k, v), None
    if format.token_scale:
        norms = NORMS[norm](k).to(getattr(torch, format.norm_dtype))
        divisor = norms.to(torch.float32)
        k = k / torch.where(divisor > 0, divisor, 1.0)[:, None, :, None]
    parts, supers, finite = [], [], [] if norms is None else [norms.isfinite().all()]
    for x, side, passed in zip((k, v), _sides(format, head_dim), (feedback, None), strict=True):
        if side.lloyd:
            stored, super_scale, fits = _encode_levels(x, side)
        else:
            stored, super_scale, fits = _encode_uniform(x, side, format, _Rounding(grid, clip, passed))
        parts += stored
        supers.append(super_scale)
        finite.append(fits)
    if not bool(torch.stack(finite).all()):
        raise does_not_fit(*given, norms, format=format)
    super_scales = torch.stack([s for s in supers if s is not None], dim=-1) if format.metadata_bits == 8 else None
    return Records(torch.cat(parts, dim=-1), norms, super_scales)


def does_not_fit(k: Tensor, v: Tensor, norms: Tensor | None, *, format: Format) -> UnsupportedInput:
    """Return the error for K and V in cache space, and their token norms, that their stored dtypes cannot hold."""
    largest = [float(x.to(torch.float32).abs().amax()) for x in (k, v)]
    largest_norm = "none" if norms is None else f"{float(norms.to(torch.float32).amax()):.4g}"
    return UnsupportedInput(
        "K or V does not fit its stored numbers: "
        f"largest |K| {largest[0]:.4g}, largest |V| {largest[1]:.4g}, token norm {largest_norm}; "
        f"scale and minimum are at most {_LARGEST:.0f}, the token norm is a {format.norm_dtype}. "
        "Nothing was packed. Keep this layer in full precision (a plan with method 'full')."
    )


def check_storable(k: Tensor, v: Tensor, *, format: Format) -> None:
    """Raise unless tokens can be packed whatever group they will share.

    Args:
        k: `[B, H, T, D]` in cache space.
        v: The same shape.
        format: What they will be packed as.

    Raises:
        UnsupportedInput: A value or a token norm is not finite or does not fit its stored dtype.
    """
    largest = torch.stack((k.abs().amax(), v.abs().amax())).tolist()
    norm = largest[0] * (k.shape[1] * k.shape[3]) ** 0.5  # never less than the largest token norm
    if format.token_scale and norm > LARGEST_TOKEN and norm != float("inf"):
        norm = float(token_norm(k).amax())
    limits = (largest[0], largest[1]) if not format.token_scale else (largest[1],)
    most = torch.finfo(getattr(torch, format.norm_dtype)).max if format.token_scale else float("inf")
    if all(value <= LARGEST_TOKEN for value in limits) and norm <= most and norm < float("inf"):
        return
    raise UnsupportedInput(
        f"K or V does not fit its stored numbers: largest |K| {largest[0]:.4g}, largest |V| {largest[1]:.4g}, "
        f"token norm at most {norm:.4g}; allowed: {LARGEST_TOKEN:.0f} for {'V' if format.token_scale else 'K and V'}, "
        f"{most:.4g} for a norm. Nothing was stored. Keep this layer in full precision (a plan with method 'full')."
    )


class _Rounding(NamedTuple):
    """How codes are chosen."""

    grid: affine.Grid
    clip: float | None
    feedback: Tensor | None


def _encode_uniform(
    x: Tensor, side: _Side, format: Format, rounding: _Rounding
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    head_dim, bits = x.shape[-1], int(side.bits)
    values = x.shape[-2] if side.axis == "channel" else side.group
    clip = affine.clip_share(bits, values) if rounding.clip is None else rounding.clip
    low, high = affine.group_range(x, axis=side.axis, group=side.group)
    low, high = affine.apply_grid(low, high, bits=bits, grid=rounding.grid, clip=clip)
    if rounding.grid == "unbiased":
        wide = affine.refit(x, low, high, bits=bits, axis=side.axis, group=side.group)
        storable = (wide[0].abs() <= _LARGEST) & (wide[1] - wide[0] <= _LARGEST * (2**bits - 1))
        low, high = (torch.where(storable, new, old) for new, old in zip(wide, (low, high), strict=True))
    fits = (low.abs() <= _LARGEST).all() & (high - low <= _LARGEST * (2**bits - 1)).all()
    meta = affine.round_metadata(low, high, bits=bits, metadata_bits=format.metadata_bits)
    scale, minimum = (
        affine.spread(t, axis=side.axis, group=side.group, head_dim=head_dim) for t in (meta.scale, meta.minimum)
    )
    if rounding.feedback is None:
        codes = affine.quantize(x, scale=scale, minimum=minimum, bits=bits)
    else:
        codes = affine.quantize_with_feedback(x, scale=scale, minimum=minimum, bits=bits, feedback=rounding.feedback)
    super_scale = None if meta.super_scale is None else meta.super_scale[..., 0, 0]
    return _stored(codes, (meta.stored_scale, meta.stored_minimum), side), super_scale, fits


def _encode_levels(x: Tensor, side: _Side) -> tuple[list[Tensor], None, Tensor]:
    """Store the root mean square of each group as a float16 and the nearest Lloyd-Max levels of the rest."""
    rms = affine.group_rms(x, axis=side.axis, group=side.group)
    stored = rms.to(torch.float16)
    scale = affine.spread(stored.to(torch.float32), axis=side.axis, group=side.group, head_dim=x.shape[-1])
    units = x / torch.where(scale > 0, scale, 1.0)
    runs = packing.channel_runs(side.bits, padded(x.shape[-1]))
    parts = zip(units.split(_within([w for _, w in runs], x.shape[-1]), dim=-1), runs, strict=True)
    codes = torch.cat([lloyd.nearest_level(part, bits=bits) for part, (bits, _) in parts], dim=-1)
    return _stored(codes, (stored,), side), None, (rms <= _LARGEST).all()


def _within(widths: list[int], head_dim: int) -> list[int]:
    """Cut widths of padded channels down to the channels that exist."""
    kept: list[int] = []
    for width in widths:
        kept.append(max(0, min(width, head_dim - sum(kept))))
    return kept


def _stored(codes: Tensor, metadata: tuple[Tensor, ...], side: _Side) -> list[Tensor]:
    """Return the bytes of one side's sections; channels up to the padded width are zeros."""
    width = padded(codes.shape[-1])
    codes = torch.nn.functional.pad(codes, (0, width - codes.shape[-1]))
    if side.axis == "channel":
        metadata = tuple(_pad_channels(t, width) for t in metadata)
    packed = packing.pack_channels(codes, bits=side.bits)
    return [packed, *(t.contiguous().flatten(-2).view(torch.uint8) for t in metadata)]


def _pad_channels(stored: Tensor, width: int) -> Tensor:
    padding = torch.zeros(*stored.shape[:-1], width - stored.shape[-1], dtype=stored.dtype, device=stored.device)
    return torch.cat((stored, padding), dim=-1)


def decode(records: Records, *, format: Format, head_dim: int) -> tuple[Tensor, Tensor]:
    """Read records back.

    Args:
        records: As `encode` made them.
        format: What the bytes mean.
        head_dim: D.

    Returns:
        K and V, float32 `[N, H, G, D]` in cache space.
    """
    k, v = _decode_sides(records.data, records.super_scales, format=format, head_dim=head_dim)
    if records.norms is not None:
        k *= records.norms.to(torch.float32)[:, None, :, None]
    return k, v


def decode_pages(pages: Pages) -> tuple[Tensor, Tensor]:
    """Read whole pages back: K and V, float32 `[P, H, 128, D]` in cache space. Records never written read as zeros.

    Raises:
        UnsupportedInput: Their bytes lie in a backend's own order.
    """
    pages.check_order(CANONICAL)
    k, v = _decode_sides(pages.records, pages.super_scales, format=pages.format, head_dim=pages.head_dim)
    if pages.norms is not None:
        k *= pages.norms.to(torch.float32).unflatten(1, (-1, pages.format.record_tokens))[:, None, :, :, None]
    return k.flatten(2, 3), v.flatten(2, 3)


def _decode_sides(data: Tensor, super_scales: Tensor | None, *, format: Format, head_dim: int) -> tuple[Tensor, Tensor]:
    sections = data.split(format.sections(head_dim).sizes, dim=-1)
    k_super, v_super = (None, None) if super_scales is None else super_scales.unbind(-1)
    k_side, v_side = _sides(format, head_dim)
    tokens = format.record_tokens
    return (
        _decode_side(sections[:3], k_side, tokens, head_dim, k_super),
        _decode_side(sections[3:], v_side, tokens, head_dim, v_super),
    )


def _decode_side(
    sections: tuple[Tensor, ...], side: _Side, tokens: int, head_dim: int, super_scale: Tensor | None
) -> Tensor:
    width = padded(head_dim)
    codes = packing.unpack_channels(sections[0], bits=side.bits, tokens=tokens, width=width)[..., :head_dim]
    rows = (1, width) if side.axis == "channel" else (tokens, channel_groups(head_dim, side.group))

    def per_channel(stored: Tensor) -> Tensor:
        wide = affine.spread(stored.unflatten(-1, rows), axis=side.axis, group=side.group, head_dim=head_dim)
        return wide[..., :head_dim]

    if side.lloyd:
        runs = packing.channel_runs(side.bits, width)
        tables = zip(codes.split(_within([w for _, w in runs], head_dim), dim=-1), runs, strict=True)
        values = [lloyd.levels(bits).to(codes.device)[part.long()] for part, (bits, _) in tables]
        return torch.cat(values, dim=-1).mul_(per_channel(sections[1].view(torch.float16).to(torch.float32)))
    scale, minimum = stored_metadata(sections[1], sections[2], super_scale)
    return affine.dequantize(codes, scale=per_channel(scale), minimum=per_channel(minimum))


def stored_metadata(scale: Tensor, minimum: Tensor, super_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn the stored bytes of scale and minimum, uint8 `[..., bytes]`, into float32. `super_scale`: 8-bit metadata."""
    if super_scale is None:
        return scale.view(torch.float16).to(torch.float32), minimum.view(torch.float16).to(torch.float32)
    wide = scale.view(torch.float8_e4m3fn).to(torch.float32) * super_scale.to(torch.float32)[..., None]
    return wide, minimum.view(torch.int8).to(torch.float32) * (wide / affine.MIN_STEPS)


def write(pages: Pages, records: Records, *, page: Tensor, slot: Tensor) -> None:
    """Put N records at their places in pages.

    Args:
        pages: Changed in place.
        records: N records.
        page: int64 `[N]`, page numbers.
        slot: int64 `[N]`, place of the record in its page, 0 .. R - 1.
    """
    pages.records[page, :, slot] = records.data
    if pages.norms is not None and records.norms is not None:
        pages.norms.view(pages.count, -1, pages.format.record_tokens)[page, slot] = records.norms
    if pages.super_scales is not None and records.super_scales is not None:
        pages.super_scales[page, :, slot] = records.super_scales


def to_groups(x: Tensor, tokens: int) -> Tensor:
    """Cut `[B, H, T, D]` into groups of `tokens`, `[B * T / tokens, H, tokens, D]`, sequence after sequence."""
    batch, heads, length, head_dim = x.shape
    return x.reshape(batch, heads, length // tokens, tokens, head_dim).transpose(1, 2).flatten(0, 1)


def places(pages: Pages) -> tuple[Tensor, Tensor]:
    """Return page number and slot, int64 `[P * R]` each, of every record of `pages` in token order."""
    index = torch.arange(pages.count * pages.format.page_records, device=pages.records.device)
    return index // pages.format.page_records, index % pages.format.page_records


def from_groups(x: Tensor, batch: int) -> Tensor:
    """Undo `to_groups`: `[B * n, H, tokens, D]` to `[B, H, n * tokens, D]`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def pages_of(tokens: int) -> int:
    """Return how many pages hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)
