"""What one layer holds, and how it is read: counts, bytes, positions, K and V in model space."""

from __future__ import annotations

import torch
from torch import Tensor

from occamkv.cache import masks, pins
from occamkv.cache.chooser import Chooser
from occamkv.cache.slots import Slots
from occamkv.cache.stepping import Stepping
from occamkv.cache.store import Store
from occamkv.cache.waiting import Waiting
from occamkv.errors import UnsupportedInput
from occamkv.methods import Method
from occamkv.methods.crossing import Crossing, Statistics


class Held:
    """Pages, residual, pins and the current step of one layer: counts, bytes, positions, and how they are read.

    `step` holds the tokens of the current step.
    """

    method: Method
    statistics: Statistics | None
    min_tokens: int
    pack_after_attend: bool
    pin_bias: Tensor | None
    chooser: Chooser | None
    step: Waiting | None
    _tokens: Store | None
    _crossing: Crossing | None
    _slots: Slots
    _stepping: Stepping | None
    dense_reads: int

    def __getstate__(self) -> dict[str, object]:
        """Leave out what holds addresses: a copy of the cache has memory of its own."""
        if self._stepping is not None:
            if self._stepping.reserved:
                raise UnsupportedInput("steps of this cache are being replayed: close() them before it is copied.")
            self._stepping.tidy()
        return self.__dict__ | {"_stepping": None}

    @property
    def store(self) -> Store | None:
        """The tokens, with all packed that should be; None before the first update."""
        if self._stepping is not None:
            self._stepping.tidy()
        return self._tokens

    @property
    def length(self) -> int:
        """Slots seen by the engine, pads and the current step included."""
        return self._slots.count + self.new

    @property
    def new(self) -> int:
        """Slots of the current step."""
        return 0 if self.step is None else self.step.k.shape[2]

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first update."""
        return 0 if self._tokens is None else len(self._tokens.rows)

    @property
    def waiting(self) -> tuple[Tensor, Tensor] | None:
        """K and V of a first step that nothing else has to be read with, `[B, H, T, D]` in model space; else None."""
        return (self.step.k, self.step.v) if self.step is not None and not self._slots.count else None

    def nbytes(self) -> dict[str, int]:
        """Return the bytes held: `packed`, `residual` (the current step included), `pins`."""
        store = self.store
        held = {"packed": 0, "residual": 0, "pins": 0} if store is None else store.nbytes()
        held["residual"] += self._slots.nbytes + (0 if self.step is None else self.step.nbytes)
        return held

    @property
    def packing_starts(self) -> int:
        """Number of tokens at which the first group of a sequence is packed."""
        return max(self.method.packing_starts, self.min_tokens)

    def packed_tokens(self) -> list[int]:
        """Return how many tokens of each sequence are packed and still there."""
        return [] if self._tokens is None else [row.held for row in self._tokens.rows]

    @property
    def key_bias_pairs(self) -> int:
        """How many pairs of channels are stored without the bias of the key projection."""
        bias = None if self._crossing is None else self._crossing.key_bias
        return 0 if bias is None else len(bias.rotary.frequencies)

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the tokens that the store holds of a sequence, float32 `[1, H, n, D]` in model space."""
        k, v = (x[None] for x in self._store().read(row))
        return self._cross.leave(k, v, pins.count(k))

    def _query_positions(self, q: Tensor) -> Tensor:
        real = self.real_slots()
        if real is None:
            return torch.arange(self.length - q.shape[2], self.length, device=q.device).expand(q.shape[0], -1)
        return masks.query_positions(real, q.shape[2])

    def real_slots(self) -> Tensor | None:
        """Return which slots hold real tokens, bool `[B, S]`, or None when all do (or nothing is known of them yet)."""
        kept = None if self.step is None else self.step.kept
        return self._slots.with_step(self.new, kept, like=(self._tokens or self._store()).residual_k)

    def slots_before(self, new: int) -> Tensor | None:
        """Return `real_slots` without the newest `new` slots."""
        real = self.real_slots()
        return None if real is None else real[:, : self.length - new]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all K and V dequantized, `[B, H, S, D]` in model space and dtype; earlier pads are zeros."""
        self.dense_reads += 1
        if self.waiting is not None:
            return self.waiting
        k, v = self._slots.spread([self.read(row) for row in range(self.batch)], like=self._store().residual_k)
        if self.step is None:
            return k, v
        return torch.cat((k, self.step.k), dim=2), torch.cat((v, self.step.v), dim=2)

    @property
    def _cross(self) -> Crossing:
        if self._crossing is None:
            raise UnsupportedInput("the cache is empty: call update(k, v) before attention reads it.")
        return self._crossing

    def _store(self) -> Store:
        store = self.store
        if store is None:
            raise UnsupportedInput("the cache is empty: call update(k, v) before attention reads it.")
        return store
