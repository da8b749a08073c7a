"""Bit planes: how codes of 2, 3 or 4 bits become bytes, in the canonical order.

2 bits are one plane of 2-bit fields; 3 bits add a plane of single bits (weight 4); 4 bits add a second 2-bit plane
(weight 4). In a 2-bit plane byte i holds values 4i..4i+3, in a 1-bit plane values 8i..8i+7, the first value in the
lowest bits. See docs/format.md.
"""

import math

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (2, 2)}
"""Width in bits of each plane, lowest weight first."""


def packed_bytes(values: int, bits: int) -> int:
    """Return how many bytes `values` codes of `bits` bits take. `values` is a multiple of 8."""
    return values * bits // 8


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """Pack codes into bit planes.

    Args:
        codes: uint8 `[..., n]`, values below `2**bits`, n a multiple of 8.
        bits: 2, 3 or 4.

    Returns:
        uint8 `[..., n * bits / 8]`, plane after plane.
    """
    planes, weight = [], 0
    for width in PLANES[bits]:
        fields = (codes >> weight) & (2**width - 1)
        per_byte = 8 // width
        fields = fields.reshape(*codes.shape[:-1], -1, per_byte)
        byte = fields[..., 0].clone()
        for i in range(1, per_byte):
            byte |= fields[..., i] << (i * width)
        planes.append(byte)
        weight += width
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, *, bits: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 `[..., n * bits / 8]`.
        bits: 2, 3 or 4.

    Returns:
        uint8 `[..., n]`.
    """
    values = packed.shape[-1] * 8 // bits
    codes = torch.zeros(*packed.shape[:-1], values, dtype=torch.uint8, device=packed.device)
    start, weight = 0, 0
    for width in PLANES[bits]:
        size = packed_bytes(values, width)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        plane = packed[..., start : start + size, None] >> shifts
        codes |= (plane & (2**width - 1)).flatten(-2) << weight
        start, weight = start + size, weight + width
    return codes


def channel_runs(bits: float, width: int) -> list[tuple[int, int]]:
    """Return bits and number of channels of each run: 2.5 bits are 3 bits for the first half and 2 for the second."""
    if bits == int(bits):
        return [(int(bits), width)]
    return [(math.ceil(bits), width // 2), (math.floor(bits), width - width // 2)]


def pack_channels(codes: Tensor, *, bits: float) -> Tensor:
    """Pack codes uint8 `[..., T, W]` run of channels after run, uint8 `[..., T * W * bits / 8]`."""
    runs = channel_runs(bits, codes.shape[-1])
    parts = codes.split([width for _, width in runs], dim=-1)
    return torch.cat([pack(p.flatten(-2), bits=b) for p, (b, _) in zip(parts, runs, strict=True)], dim=-1)


def unpack_channels(packed: Tensor, *, bits: float, tokens: int, width: int) -> Tensor:
    """Undo `pack_channels`: uint8 `[..., T, W]`."""
    runs = channel_runs(bits, width)
    parts = packed.split([packed_bytes(tokens * w, b) for b, w in runs], dim=-1)
    codes = [unpack(p, bits=b).unflatten(-1, (tokens, w)) for p, (b, w) in zip(parts, runs, strict=True)]
    return codes[0] if len(codes) == 1 else torch.cat(codes, dim=-1)
