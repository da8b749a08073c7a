"""The cache of one layer: where K, V and queries cross from model space to cache space and back.

Tokens of the current step wait in model space until an attention call has shown which of them are pads; then they are
rotated once and appended to the store. What is due is packed after the attention that used it in full precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from occamkv.cache import masks
from occamkv.cache.chooser import Chooser
from occamkv.cache.heap import give_back
from occamkv.cache.slots import Slots
from occamkv.cache.stepping import Stepping
from occamkv.cache.store import Store
from occamkv.cache.waiting import Waiting, check_same, padded
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.records import LARGEST_TOKEN, check_storable
from occamkv.kernels import FullTokens, backend_for
from occamkv.methods import Method
from occamkv.methods.crossing import Crossing, Statistics
from occamkv.methods.method import check_kv

_SLICE_VALUES = 2**18  # K values that are rotated and appended at a time
_LONG_STEP = 8 * PAGE_TOKENS  # a prompt, not speculation; its freed memory is given back to the system


class LayerCache:
    """Pages, residual and pins of one layer, behind `update`, `attend` and `dense`.

    Args:
        method: How tokens are packed.
        statistics: Of the model's queries and keys, for methods that need them.
        min_tokens: Nothing is packed below this many tokens.
        pack_after_attend: False delays packing to the next step, for engines that read one K and V several times in
            a step (layers that share their cache).
    """

    def __init__(
        self,
        method: Method,
        *,
        statistics: Statistics | None = None,
        min_tokens: int = 0,
        pack_after_attend: bool = True,
    ) -> None:
        self.method, self.statistics, self.min_tokens = method, statistics, min_tokens
        self.pack_after_attend = pack_after_attend
        self.chooser: Chooser | None = None
        self.records_past = False
        self.dense_reads = self.packed_reads = self.lossy_crops = 0
        self.store: Store | None = None
        self._crossing: Crossing | None = None
        self._waiting: Waiting | None = None
        self._slots = Slots()
        self._stepping: Stepping | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out what holds addresses: a copy of the cache has memory of its own."""
        return self.__dict__ | {"_stepping": None}

    @property
    def length(self) -> int:
        """Slots seen by the engine, pads and the current step included."""
        return self._slots.count + self.new

    @property
    def new(self) -> int:
        """Slots of the current step."""
        return 0 if self._waiting is None else self._waiting.k.shape[2]

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first update."""
        return 0 if self.store is None else len(self.store.rows)

    @property
    def waiting(self) -> tuple[Tensor, Tensor] | None:
        """K and V of a first step that nothing else has to be read with, `[B, H, T, D]` in model space; else None."""
        return (self._waiting.k, self._waiting.v) if self._waiting is not None and not self._slots.count else None

    def nbytes(self) -> dict[str, int]:
        """Return the bytes held: `packed`, `residual` (the current step included), `pins`."""
        held = {"packed": 0, "residual": 0, "pins": 0} if self.store is None else self.store.nbytes()
        held["residual"] += self._slots.nbytes + (0 if self._waiting is None else self._waiting.nbytes)
        return held

    @property
    def packing_starts(self) -> int:
        """Number of tokens at which the first group of a sequence is packed."""
        return max(self.method.pinned_tokens + self.method.lowest_pins + PAGE_TOKENS, self.min_tokens)

    def packed_tokens(self) -> list[int]:
        """Return how many tokens of each sequence are packed."""
        return [] if self.store is None else [row.packed for row in self.store.rows]

    def update(self, k: Tensor, v: Tensor) -> None:
        """Take K and V of a step.

        Args:
            k: `[B, H, T, D]` in model space, post-RoPE.
            v: The same shape.

        Raises:
            UnsupportedInput: Shape, dtype or values are not allowed. Nothing was changed.
            CacheMismatch: The cache holds another batch size, shape, dtype or device. Nothing was changed.
        """
        check_kv(k, v)
        if self.store is not None:
            check_same(k, self._store().residual_k)
        else:
            self._crossing = self.method.crossing(k, self.statistics)
        if k.shape[2] == 0:
            return
        step = Waiting(k, v)
        if self._cross.bound(k, v) > LARGEST_TOKEN:  # only values near the limit need to be rotated to know
            check_storable(*self._rotated(step), format=self.method.packed_format)
        self.commit()
        if self.store is None:
            self.store = self._new_store(k)
        self._waiting = step

    def _new_store(self, k: Tensor) -> Store:
        """Return an empty store for tokens like `k`, `[B, H, T, D]`."""
        return Store(
            self.method,
            backend_for(self.method.packed_format, k.device, k.shape[3]).name,
            shape=(k.shape[0], k.shape[1], k.shape[3]),
            dtype=k.dtype,
            device=k.device,
            min_tokens=self.min_tokens,
            feedback=self._cross.feedback,
        )

    def attend(
        self,
        q: Tensor,
        *,
        seen: masks.Seen | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend from the newest Tq slots to everything held.

        Args:
            q: `[B, Hq, Tq, D]` in model space.
            seen: The engine's mask as `masks.read_mask` understood it; None for plain causal attention without pads.
            scale: As in the backend's `attend`.
            window: As above.
            softcap: As above.
            sinks: As above.

        Returns:
            `[B, Hq, Tq, D]` in model space, dtype of q.

        Raises:
            UnsupportedInput: Shapes do not fit, or a token of this step cannot be packed.
        """
        store = self._store()
        self.note(seen)
        out = self._step(q, seen, sinks, scale=scale, window=window, softcap=softcap)
        if out is not None:
            return out
        full = store.full_tokens()
        at = self._query_positions(q)
        if self._waiting is not None:
            k, v = self._rotated(self._waiting)
            full.append(FullTokens(k, v, self._query_positions(k)))
        out = store.backend.attend(
            q,
            q_positions=at,
            packed=store.packed_tokens(),
            full=full,
            scale=scale,
            mask=None if seen is None else seen.mask,
            window=window,
            softcap=softcap,
            sinks=sinks,
            hadamard_block=self._cross.k_block,
            balance=self._cross.k_vector,
            rotate_output=self._cross.v_block is not None,
        )
        self.packed_reads += 1
        self.settle()
        return self._cross.leave_output(out)

    def _step(self, q: Tensor, seen: masks.Seen | None, sinks: Tensor | None, **options: object) -> Tensor | None:
        """Attend and settle in one call of the backend; None if this is not a plain step of one token each."""
        step, masked = self._waiting, seen is not None and seen.mask is not None
        waits = self.records_past or not self.pack_after_attend or self.chooser is not None
        if step is None or step.kept is not None or masked or waits or (q.shape[2], self.new) != (1, 1):
            return None
        self._stepping = self._stepping or Stepping(self._store(), self._cross)
        out = self._stepping.run(q, step.k, step.v, sinks=sinks, **options)
        if out is not None:
            self._waiting = None
            self._slots.append(1, None)
            self.packed_reads += 1
        return out

    def note(self, seen: masks.Seen | None) -> None:
        """Remember which tokens of the current step are real."""
        if seen is not None and self._waiting is not None:
            self._waiting.kept = seen.kept

    def note_pads(self, real: Tensor) -> None:
        """Remember which tokens of the current step are real, bool `[B, T]`.

        Raises:
            UnsupportedInput: The batch is padded on the right; the step is dropped.
        """
        kept = None if bool(real.all()) else real
        try:
            masks.refuse_right_padding(kept, self.slots_before(self.new), self._slots.count)
        except UnsupportedInput:
            self.forget_step()
            raise
        self.note(masks.Seen(kept, None))

    def settle(self) -> None:
        """Pack what is due now that attention has used it.

        A short step of several tokens waits for the next one, since speculative decoding may take it back.
        """
        if self._waiting is None or not self.pack_after_attend:
            return
        speculative = 1 < self.new < PAGE_TOKENS or (self.records_past and self.new < _LONG_STEP)
        if not speculative:
            self.commit()

    def commit(self) -> None:
        """Append the tokens of the last step to the store; pack what is due."""
        if self._waiting is None:
            return
        new = self._waiting.counts()
        if self.chooser is not None and any(self._store().due_after(new)):
            self.adopt(self.chooser.choose(self))
        step, self._waiting, self._stepping = self._waiting, None, None
        store = self._store()
        store.reserve(new)
        try:
            for part in step.slices(_SLICE_VALUES):
                kept = None if step.kept is None else step.kept[:, part]
                whole = step.rotated is not None
                k, v = self._rotated(step) if whole else self._rotate(step.k[:, :, part], step.v[:, :, part])
                store.append(k, v, kept=kept)
        except UnsupportedInput:
            store.pool.drop_free_slabs()
            self.store = store if self._slots.count else None
            raise
        self._slots.append(step.k.shape[2], step.kept)
        if step.k.shape[2] >= _LONG_STEP and step.k.device.type == "cpu":
            give_back()

    def adopt(self, method: Method) -> None:
        """Change the method while nothing is packed. What is held crosses into the new cache space, and is rounded.

        Raises:
            UnsupportedInput: Tokens are packed already. Nothing was changed.
        """
        if any(self.packed_tokens()):
            raise UnsupportedInput(
                f"{max(self.packed_tokens())} tokens are packed with {self.method}. Take a new cache, or reset()."
            )
        self.chooser = None
        statistics = self.statistics if method.needs_model else None
        if self.store is None:
            self.method, self.statistics = method, statistics
            return
        self._stepping = None
        old, crossing = self.store.residual_k, method.crossing(self.store.residual_k, statistics)
        rows = [crossing.enter(*self._read(row)) for row in range(self.batch)]
        self.method, self.statistics, self._crossing = method, statistics, crossing
        self.store = self._new_store(old)
        k, v, kept = padded(rows)
        self.store.append(k.to(old), v.to(old), kept=kept)
        if self._waiting is not None:
            self._waiting.rotated = None

    def first_tokens(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the first real tokens of a sequence, at most `count`: float32 `[1, H, n, D]`, model space.

        Those of the current step are among them.
        """
        k, v = self._read(row)
        if self._waiting is not None:
            step_k, step_v = self._waiting.first_real(row, max(0, count - k.shape[2]))
            k, v = torch.cat((k, step_k), dim=2), torch.cat((v, step_v), dim=2)
        return k[:, :, :count], v[:, :, :count]

    def _read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the tokens that the store holds of a sequence, float32 `[1, H, n, D]` in model space."""
        return self._cross.leave(*(x[None] for x in self._store().read(row)))

    def forget_step(self) -> None:
        """Drop the tokens of the current step, after an error."""
        self._waiting = None

    def _rotated(self, step: Waiting) -> tuple[Tensor, Tensor]:
        """Return the step's K and V in cache space, in the model's dtype."""
        made = step.rotated or self._rotate(step.k, step.v)
        if step.k.shape[2] < PAGE_TOKENS:
            step.rotated = made
        return made

    def _rotate(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rotated = self._cross.enter(k, v)
        return rotated[0].to(k.dtype), rotated[1].to(v.dtype)

    def _query_positions(self, q: Tensor) -> Tensor:
        real = self.real_slots()
        if real is None:
            return torch.arange(self.length - q.shape[2], self.length, device=q.device).expand(q.shape[0], -1)
        return masks.query_positions(real, q.shape[2])

    def real_slots(self) -> Tensor | None:
        """Return which slots hold real tokens, bool `[B, S]`, or None when all do (or nothing is known of them yet)."""
        kept = None if self._waiting is None else self._waiting.kept
        return self._slots.with_step(self.new, kept, like=self._store().residual_k)

    def slots_before(self, new: int) -> Tensor | None:
        """Return `real_slots` without the newest `new` slots."""
        real = self.real_slots()
        return None if real is None else real[:, : self.length - new]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all K and V dequantized, `[B, H, S, D]` in model space and dtype; earlier pads are zeros."""
        self.dense_reads += 1
        if self.waiting is not None:
            return self.waiting
        template, slots = self._store().residual_k, self._slots
        k = template.new_zeros(*template.shape[:2], slots.count, template.shape[3])
        v, real = torch.zeros_like(k), None if slots.kept is None else slots.real(slots.count, like=template)
        for row in range(self.batch):
            row_k, row_v = (x[0].to(k.dtype) for x in self._read(row))
            at = slice(None) if real is None else real[row].nonzero()[:, 0]
            k[row][:, at], v[row][:, at] = row_k, row_v
        if self._waiting is None:
            return k, v
        return torch.cat((k, self._waiting.k), dim=2), torch.cat((v, self._waiting.v), dim=2)

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was (beam search, several return sequences).

        Raises:
            UnsupportedInput: A row does not exist. Nothing was changed.
        """
        if self.store is None:
            return
        if not rows or min(rows) < -self.batch or max(rows) >= self.batch:
            raise UnsupportedInput(
                f"rows are {list(rows)}; allowed: at least one row, each below the batch size {self.batch}."
            )
        chosen = [row % self.batch for row in rows]
        index = torch.tensor(chosen, device=self.store.residual_k.device)
        self.store.select(chosen)
        self._slots.select(index)
        self._stepping = None
        if self._waiting is not None:
            self._waiting = self._waiting.select(index)

    def remove(self, count: int) -> None:
        """Forget the newest `count` slots. Below the residual whole groups are freed and the cut one is decoded.

        Raises:
            UnsupportedInput: `count` is negative or more than is held. Nothing was changed.
        """
        if not 0 <= count <= self.length:
            raise UnsupportedInput(f"cannot remove {count} tokens; allowed: 0 to the {self.length} held.")
        if self._waiting is not None and count:
            taken = min(count, self.new)
            self._waiting = self._waiting.without_newest(taken)
            count -= taken
        if not count:
            return
        counts = self._slots.remove(count, self.batch)
        self._stepping = None
        self.lossy_crops += self._store().remove(counts)

    def reset(self) -> None:
        """Forget everything, the batch size included."""
        self.store = self._waiting = self._stepping = None
        self._slots, self.records_past = Slots(), False
        self.dense_reads = self.packed_reads = self.lossy_crops = 0

    @property
    def _cross(self) -> Crossing:
        if self._crossing is None:
            raise UnsupportedInput("the cache is empty: call update(k, v) before attention reads it.")
        return self._crossing

    def _store(self) -> Store:
        if self.store is None:
            raise UnsupportedInput("the cache is empty: call update(k, v) before attention reads it.")
        return self.store
