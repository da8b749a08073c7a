"""OScaR (Su et al., arXiv:2605.19660): KIVI's format with two switches on.

It is not OSCAR (arXiv:2605.17757, by others), which is calibrated.

*Canalized Rotation*: an orthonormal Hadamard per head on post-RoPE K (and Q), and on V. *Omni-Token Scaling*: one L2
norm per token over all KV heads is divided out of K before quantizing and multiplied back into the logit.

Differences: the paper's integer zero point is kept as `minimum = -zero * scale` in float16; its norm as float32.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(
    name="oscar",
    format=Format(token_scale=True),
    k_rotation="hadamard",
    v_rotation="hadamard",
    grid="paper",
    source="Su et al. 2026, arXiv:2605.19660",
)
