"""Round to nearest: K and V per token over 32 channels, minimum and maximum of each group. The plain baseline.

It is the per-token asymmetric scheme that arXiv:2402.02750 (KIVI) compares with.
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(name="rtn", format=Format(k_axis="token"), source="baseline in arXiv:2402.02750")
