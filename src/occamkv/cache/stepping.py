"""Whole decode steps of a layer in one call of its backend, as long as nothing about a step is out of the ordinary.

Steps may be recorded and replayed. Then the backend counts in the memory of its device, the counts here follow, and up
to one flush of each sequence waits in the ring until the next step or `settle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from occamkv.cache.store import Store
from occamkv.cache.waiting import on_host
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.records import check_storable, pages_of
from occamkv.kernels import StepLayer, Stepper
from occamkv.methods.crossing import Crossing

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PAGES_AT_ONCE = 16  # that are decoded to see whether they hold numbers


class Stepping:
    """Knows the memory of a store for a backend that runs whole steps; made anew whenever that memory changed.

    Args:
        store: The layer's tokens.
        crossing: How they cross into cache space.
        pin_bias: Added to the logits of pins, `[Hq]` or one number.

    While `recording`, a step is described to the backend and not run, so nothing is counted.
    """

    def __init__(self, store: Store, crossing: Crossing, *, pin_bias: Tensor | None = None) -> None:
        self._store, self._crossing = store, crossing
        self._pin_bias = None if pin_bias is None else pin_bias.to(store.residual_k.device)
        self._spare: list[list[int]] = [[] for _ in store.rows]
        self._held: list[int] | None = None
        self._owes = self._replayed = False
        self.stepper: Stepper | None = None
        self.recording = False

    @property
    def reserved(self) -> bool:
        """Whether it was made to be replayed."""
        return self._held is not None

    def _fits(self, q: Tensor, sinks: Tensor | None) -> bool:
        """Tell whether a step's queries go with what is held; the long way says what is wrong with others."""
        batch, heads, _, head_dim = self._store.residual_k.shape
        query_heads = q.shape[1]
        shaped = query_heads > 0 and query_heads % heads == 0 and q.shape == (batch, query_heads, 1, head_dim)
        known = q.dtype in _DTYPES and q.device == self._store.residual_k.device
        return shaped and known and (sinks is None or sinks.numel() == query_heads)

    def _due(self) -> list[int] | None:
        """Return how many tokens of each sequence one more will make due; None if the step needs the long way."""
        store, rows = self._store, self._store.rows
        method = store.method
        if self._crossing.v_signs is not None or method.norm != "l2":
            return None
        room = store.residual_k.shape[2]
        for row in rows:
            pinned = method.pinning.among(row.tokens, row.tokens + 1)
            if pinned or row.residual + 1 > room or row.dropped % room:
                return None
        due = store.due_after([1] * len(rows))
        shrinks = room != store.ring_slots  # it was made larger to wait for min_tokens
        slides = any(method.dropped_tokens(row.packed + n) > row.dropped for row, n in zip(rows, due, strict=True))
        waits = any(row.residual + 1 >= PAGE_TOKENS and not n for row, n in zip(rows, due, strict=True))  # for it, too
        return None if any(due) and (method.finds_pins or shrinks or slides or waits) else due

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None, **options: object) -> Tensor | None:
        """Take one token of every sequence; None if this step needs the long way, and nothing has changed.

        Args:
            q: `[B, Hq, 1, D]` in model space.
            k: `[B, H, 1, D]` in model space.
            v: The same shape.
            sinks: As in the backend's `attend`.
            **options: scale, window and softcap, as there.
        """
        due = self._due() if self._fits(q, sinks) else None
        if self.recording:
            due = [0] * len(self._store.rows)
        if due is None:
            return None
        if any(due) and self._make_room(due):
            self.settle()
            self.stepper = None
        self.stepper = self.stepper or self._store.backend.stepper(self.describe(query_heads=q.shape[1]))
        if self.stepper is None:
            return None
        out = self.stepper(q, k, v, due=due, sinks=sinks, **options)  # type: ignore[arg-type]
        if not self.recording:
            self._count(due)
            self._owes |= any(due)  # what a device could not store it tells later
        return out

    @property
    def will_pack(self) -> bool:
        """Whether the next token makes tokens due, in a step that is run."""
        return not self.recording and any(self._due() or ())

    def check_waiting(self) -> None:
        """Raise `UnsupportedInput` unless all tokens that wait in the ring can be packed."""
        store = self._store
        try:
            check_storable(store.residual_k, store.residual_v, format=store.format)
        except UnsupportedInput as error:
            most = max(row.residual for row in store.rows)
            raise UnsupportedInput(
                f"one of the newest {most} tokens cannot be packed. crop() them, or reset() the cache. {error}"
            ) from error

    def _count(self, due: Sequence[int]) -> None:
        for row, count in zip(self._store.rows, due, strict=True):
            row.packed, row.residual = row.packed + count, row.residual + 1 - count

    def _make_room(self, due: Sequence[int]) -> bool:
        """Make sure that each sequence owns the pages that its due tokens go to; tell whether any was not foreseen.

        On a device each sequence of a ragged batch gets one page more, or it would be described anew every few steps.
        """
        store, pool, changed = self._store, self._store.pool, False
        for row, count in zip(store.rows, due, strict=True):
            if count and row.packed % PAGE_TOKENS and pool.shared(row.pages[-1]):
                row.pages[-1], changed = pool.duplicate(row.pages[-1]), True
        missing = [
            max(0, pages_of(row.held + count) - len(row.pages)) for row, count in zip(store.rows, due, strict=True)
        ]
        if any(count > len(spare) for count, spare in zip(missing, self._spare, strict=True)):
            ragged = len({row.residual for row in store.rows}) > 1
            ahead = 1 if ragged and not on_host(store.residual_k) else 0
            short = [max(0, n + ahead - len(spare)) for n, spare in zip(missing, self._spare, strict=True)]
            pool.reserve(sum(short))
            self._spare = [spare + pool.allocate(n) for n, spare in zip(short, self._spare, strict=True)]
            changed = True
        for row, spare, count in zip(store.rows, self._spare, missing, strict=True):
            row.pages = row.pages + spare[:count]
            del spare[:count]
        return changed

    def reserve(self, steps: int, *, query_heads: int) -> None:
        """Own the pages of so many more tokens of each sequence, so that one stepper takes them all.

        Raises:
            UnsupportedInput: Not every one of these steps is a plain one. Nothing was changed.
        """
        store, rows = self._store, self._store.rows
        reason = self._obstacle(steps)
        if reason is not None:
            raise UnsupportedInput(f"these steps cannot be recorded: {reason}. Call the model itself, step by step.")
        due = store.due_after([steps] * len(rows))
        for row, count in zip(rows, due, strict=True):
            if count and row.packed % PAGE_TOKENS and store.pool.shared(row.pages[-1]):
                row.pages[-1] = store.pool.duplicate(row.pages[-1])
        missing = [pages_of(row.held + count) - len(row.pages) for row, count in zip(rows, due, strict=True)]
        store.pool.reserve(sum(missing))
        self._spare = [store.pool.allocate(count) for count in missing]
        self.stepper = store.backend.stepper(self.describe(query_heads=query_heads))
        self._held = [row.held for row in rows]
        if self.stepper is None:
            self.end()
            raise UnsupportedInput(
                f"the backend {store.backend.name} has no call for a whole step, so none can be recorded. Call the "
                "model itself, step by step."
            )

    def _obstacle(self, steps: int) -> str | None:
        """Return why one of the next steps would not be a plain one, or None."""
        store, method = self._store, self._store.method
        waits = store.residual_k.shape[2] != store.ring_slots or any(
            not row.packed and row.tokens < store.min_tokens for row in store.rows
        )
        reasons = {
            "pins are found by their norms": method.finds_pins,
            "pages leave the window": method.window is not None,
            "nothing is packed below min_tokens": waits,
            "tokens at named positions will be pinned": any(
                method.pinning.among(row.tokens, row.tokens + steps) for row in store.rows
            ),
        }
        if self._due() is None and not any(reasons.values()):
            return f"{method} is taken by no call for a whole step"
        return next((reason for reason, holds in reasons.items() if holds), None)

    def advance(self) -> None:
        """Count a step that was replayed.

        Raises:
            UnsupportedInput: More steps than were reserved.
        """
        due = self._due()
        if due is None or self._make_room(due):
            raise UnsupportedInput("more steps were replayed than were reserved. reset() the cache.")
        self._count(due)
        self._owes = self._replayed = True

    def settle(self) -> None:
        """Pack what replayed steps have left over, so that the store is what its counts say.

        Raises:
            UnsupportedInput: A step could not be stored. It is raised again until the layer is reset.
        """
        if self._owes and self.stepper is not None:
            self.stepper.settle()
        self._owes = False

    def tidy(self) -> None:
        """Leave the store as its counts say, to be looked at: settled, and no page ahead but for replays."""
        self.settle()
        if not self.reserved and any(self._spare):
            self._give_back()

    def _give_back(self) -> None:
        spare, self._spare = [number for row in self._spare for number in row], [[] for _ in self._spare]
        self.stepper = None
        self._store.pool.release(spare)

    def end(self) -> None:
        """Settle, and give back the pages that were not needed.

        Raises:
            UnsupportedInput: A step could not be stored, or a replayed one stored what is no number. Nothing was
                given back, and it is raised again until the layer is reset.
        """
        self.settle()
        if self._replayed:
            self._check_replayed()
        self._give_back()

    def _check_replayed(self) -> None:
        """Raise unless all that was stored since `reserve` are numbers: replays look at none."""
        self.check_waiting()
        store, packed = self._store, self._store.packed_tokens()
        for row, held in zip(store.rows, self._held or (), strict=True):
            fresh = row.pages[held // PAGE_TOKENS : pages_of(row.held)]
            for first in range(0, len(fresh), _PAGES_AT_ONCE):
                if packed is None:
                    break
                k, v = store.backend.decode(packed.gather(fresh[first : first + _PAGES_AT_ONCE]))
                if not bool(k.isfinite().all() & v.isfinite().all()):
                    raise UnsupportedInput("K or V of replayed steps held a NaN, an infinity or a number too large.")

    def describe(self, *, query_heads: int = 1) -> StepLayer:
        """Return what a backend needs to know of the layer."""
        bias = None if self._pin_bias is None else self._pin_bias.expand(query_heads)
        store, method, crossing = self._store, self._store.method, self._crossing
        rows = store.rows
        waits = method.finds_pins or store.residual_k.shape[2] != store.ring_slots  # then no plain step packs
        return StepLayer(
            slabs=store.pool.slabs,
            starts=store.pool.starts,
            tables=[row.pages + spare for row, spare in zip(rows, self._spare, strict=True)],
            first_position=[store.first_number(row) for row in rows],
            skips=store.skips(),
            packed=[row.held for row in rows],
            residual=[row.residual for row in rows],
            ring=(store.residual_k, store.residual_v),
            pins=replace(store.pinned(), logit_bias=bias),
            format=store.format,
            flush_tokens=0 if waits else method.flush_tokens,
            grid=method.grid,
            clip=method.clip,
            feedback=store.feedback,
            hadamard_block=crossing.k_block,
            balance=crossing.k_vector,
            key_bias=crossing.key_bias,
            rotate_v=crossing.v_block is not None,
        )
