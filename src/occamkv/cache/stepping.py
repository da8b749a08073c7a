"""Whole decode steps of a layer in one call of its backend, as long as nothing about a step is out of the ordinary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from occamkv.cache.store import Store
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.records import pages_of
from occamkv.kernels import StepLayer, Stepper
from occamkv.methods.crossing import Crossing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Stepping:
    """Knows the memory of a store for a backend that runs whole steps; made anew whenever that memory changed.

    Args:
        store: The layer's tokens.
        crossing: How they cross into cache space.
        pin_bias: Added to the logits of pins, `[Hq]` or one number.
    """

    def __init__(self, store: Store, crossing: Crossing, *, pin_bias: Tensor | None = None) -> None:
        self._store, self._crossing, self._pin_bias = store, crossing, pin_bias
        self._stepper: Stepper | None = None

    def _fits(self, q: Tensor, sinks: Tensor | None) -> bool:
        """Tell whether a step's queries go with what is held; the long way says what is wrong with others."""
        batch, heads, _, head_dim = self._store.residual_k.shape
        query_heads = q.shape[1]
        shaped = query_heads > 0 and query_heads % heads == 0 and q.shape == (batch, query_heads, 1, head_dim)
        return shaped and q.device == self._store.residual_k.device and (sinks is None or sinks.numel() == query_heads)

    def _due(self, q: Tensor) -> list[int] | None:
        """Return how many tokens of each sequence one more will make due; None if the step needs the long way."""
        store, rows = self._store, self._store.rows
        method = store.method
        if q.dtype not in _DTYPES or self._crossing.v_signs is not None or method.norm != "l2":
            return None
        room = store.residual_k.shape[2]
        for row in rows:
            pinned = method.pinning.among(row.tokens, row.tokens + 1)
            if pinned or row.residual + 1 > room or row.dropped % room:
                return None
        due = store.due_after([1] * len(rows))
        shrinks = room != store.ring_slots  # it was made larger to wait for min_tokens
        slides = any(method.dropped_tokens(row.packed + n) > row.dropped for row, n in zip(rows, due, strict=True))
        return None if any(due) and (method.finds_pins or shrinks or slides) else due

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None, **options: object) -> Tensor | None:
        """Take one token of every sequence; None if this step needs the long way, and nothing has changed.

        Args:
            q: `[B, Hq, 1, D]` in model space.
            k: `[B, H, 1, D]` in model space.
            v: The same shape.
            sinks: As in the backend's `attend`.
            **options: scale, window and softcap, as there.
        """
        rows, due = self._store.rows, self._due(q) if self._fits(q, sinks) else None
        if due is None:
            return None
        if any(due) and self._make_room(due):
            self._stepper = None
        if self._stepper is None:
            self._stepper = self._store.backend.stepper(self.describe(query_heads=q.shape[1]))
            if self._stepper is None:
                return None
        out = self._stepper(q, k, v, due=due, sinks=sinks, **options)  # type: ignore[arg-type]
        for row, count in zip(rows, due, strict=True):
            row.packed, row.residual = row.packed + count, row.residual + 1 - count
        return out

    def _make_room(self, due: Sequence[int]) -> bool:
        """Make sure that each sequence owns the pages that its due tokens go to; tell whether any was new."""
        pool, changed = self._store.pool, False
        for row, count in zip(self._store.rows, due, strict=True):
            missing = pages_of(row.held + count) - len(row.pages)
            if count and row.packed % PAGE_TOKENS and pool.shared(row.pages[-1]):
                row.pages[-1], changed = pool.duplicate(row.pages[-1]), True
            if missing > 0:
                row.pages, changed = row.pages + pool.allocate(missing), True
        return changed

    def describe(self, *, query_heads: int = 1) -> StepLayer:
        """Return what a backend needs to know of the layer."""
        bias = None if self._pin_bias is None else self._pin_bias.expand(query_heads)
        store, method, crossing = self._store, self._store.method, self._crossing
        rows, waits = store.rows, store.residual_k.shape[2] != store.ring_slots  # for min_tokens
        return StepLayer(
            slabs=store.pool.slabs,
            starts=store.pool.starts,
            tables=[row.pages for row in rows],
            first_position=[store.first_number(row) for row in rows],
            skips=store.skips(),
            packed=[row.held for row in rows],
            residual=[row.residual for row in rows],
            ring=(store.residual_k, store.residual_v),
            pins=replace(store.pinned(), logit_bias=bias),
            format=store.format,
            flush_tokens=0 if method.finds_pins or waits else method.flush_tokens,
            grid=method.grid,
            clip=method.clip,
            feedback=store.feedback,
            hadamard_block=crossing.k_block,
            balance=crossing.k_vector,
            key_bias=crossing.key_bias,
            rotate_v=crossing.v_block is not None,
        )
