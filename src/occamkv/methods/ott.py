"""OTT (Su et al., arXiv:2505.10938): KIVI with a pool of outlier tokens, the lowest K norms, in full precision.

Differences: the pool of five is filled once, from the first 128 tokens, since packed tokens never change; OTT goes on
exchanging its members. Group and residual are those of the comparison in arXiv:2605.19660 (32 and 128).
"""

from occamkv.formats.format import Format
from occamkv.methods.method import Method

METHOD = Method(name="ott", format=Format(), pins="lowest:5", source="Su et al. 2025, arXiv:2505.10938")
