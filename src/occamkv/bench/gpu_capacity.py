"""The largest batch that fits a GPU: computed from bytes, and tried on the memory that is there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from occamkv.bench.gpu_decode import Entrant, ModelSteps, release
from occamkv.bench.gpu_timing import Dropped, first_line
from occamkv.methods import Method

STATIC_CACHE = "static cache"
_ATTEMPTS = 4
_LESS = 0.94
_MARGIN = 2**32  # bytes for activations and for filling a cache


def computed(steps: ModelSteps) -> list[dict[str, Any]]:
    """Return how many sequences fit each size of memory beside the weights, caches alone counted."""
    rows = []
    for context in steps.setting.batch_contexts:
        for one in (*steps.setting.chosen, None):
            each = _bytes(steps, one, context, 1)
            batches = {str(gib): max(0, (gib * 2**30 - steps.weight_bytes) // each) for gib in steps.setting.memory_gib}
            rows.append({"context": context, "method": _name(one), "sequence_bytes": each, "batch_by_gib": batches})
    return rows


def tried(steps: ModelSteps, context: int, method: Method | None) -> list[dict[str, Any]]:
    """Return a row with the largest batch found to run, its speed, and the most memory that was allocated.

    It begins with what is computed for the memory that is free, and takes less while CUDA refuses.

    Raises:
        Dropped: No batch of four ran.
    """
    batch = (steps.rig.memory_bytes - steps.weight_bytes - _MARGIN) // _bytes(steps, method, context, 1)
    reason = "not one sequence fits"
    for _ in range(_ATTEMPTS):
        if batch < 1:
            break
        try:
            return [_run(steps, context, method, batch)]
        except RuntimeError as refused:  # also what a capture that ran out of memory ends with
            reason = f"batch {batch}: {first_line(refused)}"
        release(steps.rig)
        batch = int(batch * _LESS)
    raise Dropped(reason)


def _run(steps: ModelSteps, context: int, method: Method | None, batch: int) -> dict[str, Any]:
    on_gpu = steps.rig.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with ExitStack() as stack:
        entrants: dict[str, Entrant]
        if method is None:
            entrants, _ = steps.static(context, batch, masked=False)
        else:
            entrants = {str(method): steps.packed(method, context, batch, stack)[0]}
        ms = {name: min(entrant() for _ in range(2)) for name, entrant in entrants.items()}
    best = min(ms, key=lambda name: ms[name])
    return {
        "context": context,
        "method": _name(method),
        "entrant": best,
        "batch": batch,
        "cache_bytes": _bytes(steps, method, context, batch),
        "weight_bytes": steps.weight_bytes,
        "most_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "ms": ms[best],
        "tokens_per_s": 1000 * batch / ms[best],
    }


def _bytes(steps: ModelSteps, method: Method | None, context: int, batch: int) -> int:
    return steps.stock_bytes(context, batch) if method is None else steps.packed_bytes(method, context, batch)


def _name(method: Method | None) -> str:
    return STATIC_CACHE if method is None else str(method)
