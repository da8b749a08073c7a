"""How far a mean can be trusted: percentile bootstrap intervals (Efron, Annals of Statistics 7(1), 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_DRAWS_AT_ONCE = 2**22
_TAIL = 0.025


def bootstrap(
    values: Sequence[float] | Sequence[Sequence[float]], *, seed: int, resamples: int = 1000
) -> tuple[float, float] | None:
    """Return a 95 % interval of the mean, or None if fewer than two values (or groups) say nothing about it.

    Args:
        values: The values; or groups of them, such as the positions of a window, which depend on each other. Whole
            groups are then drawn, and the mean is over all values of the drawn ones, so a long group weighs more.
        seed: The same seed gives the same interval.
        resamples: How often as many values (or groups) as there are get drawn with replacement.
    """
    groups = [[v] if isinstance(v, (int, float)) else v for v in values if isinstance(v, (int, float)) or len(v)]
    if len(groups) < 2:
        return None
    sums = torch.tensor([sum(group) for group in groups], dtype=torch.float64)
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _DRAWS_AT_ONCE // len(groups))
    means = []
    for first in range(0, resamples, rows):
        shape = (min(rows, resamples - first), len(groups))
        drawn = torch.randint(len(groups), shape, generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([_TAIL, 1 - _TAIL], dtype=torch.float64)).tolist()
    return low, high
