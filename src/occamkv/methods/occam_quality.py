"""occam with error feedback on K, and pins that are found by their norms (see `methods.occam`).

Each channel's rounding error is passed on to the channels behind it, weighted by the second moment of the model's own
queries (LDLQ, Chee et al., arXiv:2307.13304; GPTQ, Frantar et al., arXiv:2210.17323), which comes from random token
ids as the balance vector does. Encoding takes longer, decoding does not; found pins take 0.05 bits or so.
"""

from occamkv.methods.occam import METHOD as OCCAM

METHOD = OCCAM.variant("occam_quality", feedback=True, pins="first:4+found")
