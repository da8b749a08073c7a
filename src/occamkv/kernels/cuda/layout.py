"""The native order of a record on GPUs: the canonical bytes, moved to where the lanes of a warp read them.

Every bit of the canonical record is there once, in the same section, so the size is the same and the way back exact.
A warp reads 32 tokens at a time. What a lane needs of them lies in whole words, and fields lie where one logical
operation turns two codes into two float16 (docs/format.md has a drawing).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats import Format, padded
from occamkv.formats.format import channel_groups
from occamkv.formats.records import stored_metadata
from occamkv.ops import packing

ORDER = "cuda-1"
"""Name of this order; any change of it is another number."""

LARGEST_K_SCALE, LARGEST_K_SCALE_BY_NORM = 4094.0, 127.0
"""Of K, and of K divided by its token norm: q times it must fit a float16 (`Q_EXPONENT` in native/layout.cuh)."""

LARGEST_V_SCALE = 1023.0
"""The weight of a token times it must fit a float16 (`P_EXPONENT`)."""

_Order = tuple[int, ...]
# Bytes of metadata: how one section's dimensions are cut, and the order in which they lie.
_K_METADATA: dict[int, tuple[tuple[int, ...], _Order]] = {
    16: ((-1, 4, 4, 2), (0, 2, 1, 3)),  # 8 k + 2 p + low of 32 channels: [block][p][k][low]
    8: ((-1, 2, 2, 4, 2), (0, 3, 1, 4, 2)),  # k = 2 word + odd: [block][p][word][low][odd]
}
_V_METADATA: dict[int, tuple[tuple[int, ...], _Order]] = {
    16: ((-1, 4, 4, 2), (0, 4, 2, 1, 3)),  # the same of 32 tokens, behind the group: [sub][group][p][k][low]
    8: ((-1, 2, 2, 4, 2), (0, 5, 3, 1, 4, 2)),
}


def to_native(records: Tensor, *, format: Format, head_dim: int) -> Tensor:
    """Bring canonical records, uint8 `[..., record_bytes]`, into native order."""
    return _convert(records, format, head_dim, _native_codes, _move)


def to_canonical(records: Tensor, *, format: Format, head_dim: int) -> Tensor:
    """Undo `to_native`."""
    return _convert(records, format, head_dim, _canonical_codes, _move_back)


def check_range(records: Tensor, super_scales: Tensor | None, *, format: Format, head_dim: int) -> None:
    """Raise unless every product of the kernel fits a float16. Minimums have no limit: nothing multiplies them there.

    Args:
        records: uint8 `[..., record_bytes]`, canonical.
        super_scales: float16 `[..., 2]`, or None with 16-bit metadata.
        format: What the bytes mean.
        head_dim: D.

    Raises:
        UnsupportedInput: A scale is too large.
    """
    sections = records.split(format.sections(head_dim).sizes, dim=-1)
    k_super, v_super = (None, None) if super_scales is None else super_scales.unbind(-1)
    k_limit = LARGEST_K_SCALE_BY_NORM if format.token_scale else LARGEST_K_SCALE
    k_limit = k_limit if super_scales is None else float("inf")
    sides = (("K", sections[1], k_super, k_limit), ("V", sections[4], v_super, LARGEST_V_SCALE))
    for name, stored, super_scale, limit in sides:
        scale, _ = stored_metadata(stored, stored, super_scale)
        if name == "V" and super_scale is not None:  # the kernel multiplies it by 256; no encoder makes it that large
            scale = torch.maximum(scale, 8 * super_scale.float()[..., None])
        if scale.numel() and float(scale.amax()) > limit:
            raise UnsupportedInput(
                f"the largest scale of {name} is {float(scale.amax()):.4g}; allowed on GPUs: {limit:.0f}. "
                "Keep this layer in full precision (a plan with method 'full')."
            )


def _convert(
    records: Tensor,
    format: Format,
    head_dim: int,
    codes: Callable[..., Tensor],
    move: Callable[[Tensor, tuple[int, ...], _Order], Tensor],
) -> Tensor:
    width, meta = padded(head_dim), format.metadata_bits // 8
    sizes = format.sections(head_dim).sizes
    k_codes, k_scale, k_minimum, v_codes, v_scale, v_minimum = records.flatten(0, -2).split(sizes, dim=-1)
    groups = channel_groups(head_dim, format.v_group)
    k_cut, k_order = _K_METADATA[format.metadata_bits]
    v_cut, v_order = _V_METADATA[format.metadata_bits]
    parts = [
        codes(k_codes, int(format.k_bits), format.record_tokens, width, by_token=True),
        *(move(x, (*k_cut, meta), (*k_order, len(k_cut))) for x in (k_scale, k_minimum)),
        codes(v_codes, int(format.v_bits), format.record_tokens, width, by_token=False),
        *(move(x, (*v_cut, groups, meta), (*v_order, len(v_cut) + 1)) for x in (v_scale, v_minimum)),
    ]
    return torch.cat(parts, dim=-1).reshape(records.shape)


def _move(x: Tensor, cut: tuple[int, ...], order: _Order) -> Tensor:
    """Cut the last dimension of `[N, bytes]` and put the pieces into another order."""
    return x.unflatten(-1, cut).permute(0, *(i + 1 for i in order)).flatten(1)


def _move_back(x: Tensor, cut: tuple[int, ...], order: _Order) -> Tensor:
    known = [n for n in cut if n > 0]
    sizes = [n if n > 0 else x.shape[-1] // torch.Size(known).numel() for n in cut]
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.unflatten(-1, [sizes[i] for i in order]).permute(0, *(i + 1 for i in back)).flatten(1)


# Codes of 32 tokens and 32 channels as `[sub, block, tile, upper, r, p, low, step, high]`. A tile product takes 16
# tokens of K (rows: 8 upper + r) and 16 channels (8 high + 2 p + low); of V it takes 16 channels (rows: 8 high + r) and
# 16 tokens (8 upper + 2 p + low).
_K_CUT = (-1, 2, 2, 8, -1, 2, 2, 4, 2)  # [sub, tile, upper, r][block, step, high, p, low]
_V_CUT = (-1, 2, 2, 4, 2, -1, 2, 2, 8)  # [sub, tile, upper, p, low][block, step, high, r]
_K_ORDER = (0, 4, 1, 2, 3, 7, 8, 5, 6)
_V_ORDER = (0, 5, 1, 2, 8, 3, 4, 6, 7)


def _cut(tokens: int, width: int, *, by_token: bool) -> tuple[tuple[int, ...], _Order]:
    if by_token:
        return (tokens // 32, *_K_CUT[1:4], width // 32, *_K_CUT[5:]), _K_ORDER
    return (tokens // 32, *_V_CUT[1:5], width // 32, *_V_CUT[6:]), _V_ORDER


def _native_codes(packed: Tensor, bits: int, tokens: int, width: int, *, by_token: bool) -> Tensor:
    codes = packing.unpack(packed, bits=bits)
    codes = _move(codes, *_cut(tokens, width, by_token=by_token))
    codes = codes.unflatten(
        -1, (-1, width // 32, 2, 2, 8, 4, 2, 2, 2)
    )  # sub, block, tile, upper, r, p, low, step, high
    if bits == 4:
        fields = codes.permute(0, 1, 2, 8, 3, 5, 6, 7, 4, 9)  # sub, block, step, tile, r, p, low, upper, high
        return _words(_fields(fields, 4).flatten(2, 4)).flatten(1)
    low = codes.permute(0, 1, 2, 3, 5, 6, 7, 4, 8, 9)  # sub, block, tile, r, p, low, upper, step, high
    words = [_words(_fields((low & 3).flatten(-2), 2).flatten(2, 3))]
    if bits == 3:  # sub, block, r, p, low, tile from the second, step, high, upper from the second
        third = (codes >> 2).flip(3, 4).permute(0, 1, 2, 5, 6, 7, 3, 8, 9, 4)
        words.append(_words(_fields(third.flatten(-3), 1)))
    return torch.cat(words, dim=-1).flatten(1)


def _canonical_codes(packed: Tensor, bits: int, tokens: int, width: int, *, by_token: bool) -> Tensor:
    blocks, sub = width // 32, tokens // 32
    planes = packed.unflatten(-1, (sub, -1))
    if bits == 4:
        fields = _unfields(_unwords(planes, 4 * blocks).unflatten(2, (blocks, 2, 2)), 4)
        codes = fields.permute(0, 1, 2, 4, 8, 5, 6, 7, 3, 9)
    else:
        first = planes[..., : 256 * blocks]
        fields = _unfields(_unwords(first, 2 * blocks).unflatten(2, (blocks, 2)), 2).unflatten(-1, (2, 2))
        codes = fields.permute(0, 1, 2, 3, 7, 4, 5, 6, 8, 9)
        if bits == 3:
            third = _unfields(_unwords(planes[..., 256 * blocks :], blocks), 1).unflatten(-1, (2, 2, 2))
            codes = codes | third.permute(0, 1, 2, 6, 9, 3, 4, 5, 7, 8).flip(3, 4) << 2
    cut, order = _cut(tokens, width, by_token=by_token)
    return packing.pack(_move_back(codes.flatten(1), cut, order), bits=bits)


def _fields(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension, of 8 / bits codes, into bytes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8)


def _unfields(packed: Tensor, bits: int) -> Tensor:
    """Undo `_fields`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return packed[..., None] >> shifts & 2**bits - 1


def _runs(words: int) -> list[int]:
    """How the words of a lane are loaded: 4 at a time, then 2, then 1."""
    return [4] * (words // 4) + [n for n in (2, 1) if words & n]


def _words(x: Tensor) -> Tensor:
    """`[N, sub, words, 8, 4, low, upper]` bytes into loads of a warp, `[N, sub, bytes]`."""
    lanes = x.flatten(-2).flatten(-3, -2)  # [N, sub, words, lane, 4]
    return torch.cat([part.transpose(2, 3).flatten(2) for part in lanes.split(_runs(lanes.shape[2]), dim=2)], dim=-1)


def _unwords(x: Tensor, words: int) -> Tensor:
    """Undo `_words`."""
    runs = _runs(words)
    parts = x.split([128 * n for n in runs], dim=-1)
    lanes = [p.unflatten(-1, (32, n, 4)).transpose(2, 3) for p, n in zip(parts, runs, strict=True)]
    return torch.cat(lanes, dim=2).unflatten(-2, (8, 4)).unflatten(-1, (2, 2))
