"""QuaRot's KV cache (Ashkboos et al., arXiv:2404.00456): Hadamard per head, then per token over the whole head.

Differences: no clipping search and no calibration; the minimum is a float16 number. A group of 256 means head_dim.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(
    name="quarot",
    format=Format(k_axis="token", k_group=256, v_group=256),
    k_rotation="hadamard",
    v_rotation="hadamard",
    source="Ashkboos et al. 2024, arXiv:2404.00456",
)
