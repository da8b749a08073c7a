"""The data-free part of RotateKV (Su et al., arXiv:2501.16383): Hadamard, per token, clipped, first tokens full.

Differences: RotateKV rotates before RoPE and over groups of four heads, reorders channels by calibration, and finds its
pivot tokens by massive activations. A cache sees K after RoPE and no activations, so here each head is rotated after
RoPE, channels keep their order, and the pivots are the first four tokens and those that their norms give away.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(
    name="rotatekv",
    format=Format(k_axis="token", k_group=128, v_group=128),
    k_rotation="hadamard",
    v_rotation="hadamard",
    clip=0.8,
    pins="first:4+found",
    source="Su et al. 2025, arXiv:2501.16383",
)
