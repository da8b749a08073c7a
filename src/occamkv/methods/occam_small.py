"""occam in 2.3 bits: groups of 64, so that scales and minimums take half as much (see `methods.occam`).

Without a paper of its own; the recipe it changes is OScaR's (arXiv:2605.19660).
"""

from occamkv.methods.occam import METHOD as OCCAM

METHOD = OCCAM.variant("occam_small", k_group=64, v_group=64)
