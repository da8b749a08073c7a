"""TurboQuant for squared error (Zandieh et al., arXiv:2504.19874): norm out, random rotation, Lloyd-Max levels.

Each head's K and V: one float16 norm per token; fixed random signs, then Hadamard; the nearest of `2^b` levels that are
best for a unit normal coordinate. 2.5 bits spend 3 on the first half of the channels and 2 on the second.

Differences: the rotation is a random-sign Hadamard, not a dense random matrix; no 1-bit sketch of the residual
(TurboQuant-prod), which softmax attention does worse with (arXiv:2605.19660, table 5); the newest 128 tokens stay full.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(
    name="turboquant",
    format=Format(k_bits=2.5, v_bits=2.5, k_axis="token", k_group=256, v_group=256, levels="lloyd"),
    k_rotation="random",
    v_rotation="random",
    source="Zandieh et al. 2025, arXiv:2504.19874",
)
