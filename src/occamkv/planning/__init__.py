"""What a model and its cache take, from the configuration alone, and what fits into a memory."""

from occamkv.planning.estimate import Need, estimate
from occamkv.planning.fit import largest_batch, longest_context
from occamkv.planning.workload import Workload

__all__ = ["Need", "Workload", "estimate", "largest_batch", "longest_context"]
