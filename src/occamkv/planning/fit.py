"""The longest context and the largest batch whose cache fits into a number of bytes."""

from __future__ import annotations

from collections.abc import Callable

from occamkv.cache import Plan
from occamkv.cache.sizes import ModelSizes
from occamkv.planning.estimate import estimate
from occamkv.planning.workload import Workload

MOST = 2**30
"""Searches end here: a cache that still fits does not grow."""


def longest_context(sizes: ModelSizes, plan: Plan, load: Workload, room: int) -> int:
    """Return the most tokens per sequence whose cache, while the prompt is read, takes `room` bytes; 0 if none fits."""
    return _largest(lambda count: estimate(sizes, plan, load.with_context(count)).peak <= room)


def largest_batch(sizes: ModelSizes, plan: Plan, load: Workload, room: int) -> int:
    """Return the most sequences whose cache, while their prompts are read, takes `room` bytes; 0 if not one fits."""
    return _largest(lambda count: estimate(sizes, plan, load.with_batch(count)).peak <= room)


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `MOST` that fits; what fits a number fits all smaller ones."""
    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1 and low < MOST:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
