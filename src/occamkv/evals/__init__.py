"""What a method costs: a model with a packed cache against the same model with a full one."""

from occamkv.evals.fidelity import Fidelity, Tally, chunk_ends, compare
from occamkv.evals.suite import Protocol, evaluate
from occamkv.evals.texts import read_text

__all__ = ["Fidelity", "Protocol", "Tally", "chunk_ends", "compare", "evaluate", "read_text"]
