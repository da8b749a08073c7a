"""KIVI (Liu et al., arXiv:2402.02750): K per channel over 32 tokens, V per token over 32 channels, no rotation.

Differences: the residual empties 128 tokens at a time for K and V alike (KIVI slides V's window token by token), the
minimum is a float16 number, and codes are chosen after the metadata is rounded.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(name="kivi", format=Format(), source="Liu et al. 2024, arXiv:2402.02750")
