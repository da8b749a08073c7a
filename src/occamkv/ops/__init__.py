"""The arithmetic in plain torch, to be read beside the paper. Only kernels write it a second time."""

from occamkv.ops.affine import apply_grid, dequantize, group_range, quantize, round_metadata, spread
from occamkv.ops.hadamard import hadamard, hadamard_block, rotate, rotate_back
from occamkv.ops.norms import token_norm
from occamkv.ops.packing import pack, packed_bytes, unpack

__all__ = [
    "apply_grid",
    "dequantize",
    "group_range",
    "hadamard",
    "hadamard_block",
    "pack",
    "packed_bytes",
    "quantize",
    "rotate",
    "rotate_back",
    "round_metadata",
    "spread",
    "token_norm",
    "unpack",
]
