"""Levels of the Lloyd-Max quantizer of a unit normal variable (Max 1960; TurboQuant, arXiv:2504.19874, uses them).

After a random rotation the coordinates of a vector of norm sqrt(D) are close to unit normal, whatever the vector was.
"""

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

_ITERATIONS = 2000


@cache
def levels(bits: int) -> Tensor:
    """Return the `2**bits` levels in ascending order, float32, computed in float64 from the fixed-point equations.

    Each level is the mean of the normal density between its two thresholds; each threshold is the middle of two levels.
    """
    count = 2**bits
    points = [4.0 * (i + 0.5) / count - 2.0 for i in range(count)]
    for _ in range(_ITERATIONS):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(points)), math.inf]
        points = [_mean_between(low, high) for low, high in pairwise(edges)]
    return torch.tensor(points, dtype=torch.float64).to(torch.float32)


def nearest_level(x: Tensor, *, bits: int) -> Tensor:
    """Return the code of the nearest level, uint8; `x` float32 in units of the standard deviation."""
    table = levels(bits).to(x.device)
    return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _mean_between(low: float, high: float) -> float:
    weight = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return (_density(low) - _density(high)) / weight


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
