"""KVarN (arXiv:2606.03458): rotate, even out tokens and channels of a tile in turn, then round to nearest.

Differences: a tile's token divisors are one number per token over all KV heads (here the token norm of K), not one per
head; V is evened out by its own scales alone, per token over the head. K has 4 bits and V 2, as KVarN ships.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(
    name="kvarn",
    format=Format(k_bits=4, k_group=128, v_group=128, token_scale=True, norm_dtype="float16"),
    k_rotation="hadamard",
    v_rotation="hadamard",
    norm="sinkhorn",
    source="KVarN 2026, arXiv:2606.03458",
)
