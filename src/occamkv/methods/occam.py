"""occam, ours and the default: what the paper's recipe becomes when its parts are measured one by one.

It is OScaR (arXiv:2605.19660) with a balanced rotation (`ops.balance`), the first four tokens pinned, ranges clipped to
what suits bits and group and refitted to slope 1 (`ops.affine.refit`), 8-bit metadata, a residual that rolls, and the
bias of a key projection taken out where it would spoil the groups. Each part earns its place in docs/methods.md.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(
    name="occam",
    format=Format(token_scale=True, norm_dtype="float16", metadata_bits=8),
    k_rotation="balanced",
    v_rotation="hadamard",
    grid="unbiased",
    clip=None,
    flush="rolling",
    pins="first:4",
    key_bias="remove",
    source="occamkv, after arXiv:2605.19660",
)
