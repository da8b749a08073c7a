"""What a method costs: a model with a packed cache against the same model with a full one."""

from occamkv.evals.fidelity import Fidelity, Tally, chunk_ends, compare

__all__ = ["Fidelity", "Tally", "chunk_ends", "compare"]
