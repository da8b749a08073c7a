"""The cache of one layer: where K, V and queries cross from model space to cache space and back.

Tokens of the current step wait in model space until an attention call has shown which of them are pads; then they are
rotated once and appended to the store. What is due is packed after the attention that used it in full precision.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from occamkv.cache import masks, pins
from occamkv.cache.chooser import Chooser
from occamkv.cache.heap import give_back
from occamkv.cache.held import Held
from occamkv.cache.slots import Slots
from occamkv.cache.stepping import Stepping
from occamkv.cache.store import Store
from occamkv.cache.waiting import Waiting, check_same, enter, on_host, padded
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.kernels import backend_for
from occamkv.methods import Method
from occamkv.methods.crossing import Crossing, Statistics
from occamkv.methods.method import check_kv

_LONG_STEP = 8 * PAGE_TOKENS  # a prompt, not speculation; its freed memory is given back to the system


class LayerCache(Held):
    """Pages, residual and pins of one layer, behind `update`, `attend` and `dense`.

    Args:
        method: How tokens are packed.
        statistics: Of the model's queries and keys, for methods that need them.
        min_tokens: Nothing is packed below this many tokens.
        pack_after_attend: False delays packing to the next step, for engines that read one K and V several times in
            a step (layers that share their cache).
        pin_bias: Added to the logits of pins, float32 `[Hq]` or one number for all heads.
    """

    def __init__(
        self,
        method: Method,
        *,
        statistics: Statistics | None = None,
        min_tokens: int = 0,
        pack_after_attend: bool = True,
        pin_bias: Tensor | None = None,
    ) -> None:
        self.method, self.statistics, self.min_tokens = method, statistics, min_tokens
        self.pack_after_attend, self.pin_bias = pack_after_attend, pin_bias
        if method.window is not None and min_tokens > method.window:
            raise UnsupportedInput(
                f"min_tokens is {min_tokens}; allowed: at most the window of {method.window} tokens."
            )
        self.chooser: Chooser | None = None
        self.records_past = False
        self.dense_reads = self.packed_reads = self.lossy_crops = 0
        self._tokens: Store | None = None
        self._crossing: Crossing | None = None
        self.step: Waiting | None = None
        self._slots = Slots()
        self._stepping: Stepping | None = None

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
        if self._tokens is not None:
            check_same(k, self._tokens.residual_k)
        else:
            self._crossing = self.method.crossing(k, self.statistics)
        if k.shape[2] == 0:
            return
        step = Waiting(k, v)
        if self._stepping is None or step.k.shape[2] > 1 or on_host(k):  # else no step waits for a GPU to be looked at
            step.check(self._cross, self.method.packed_format)
        self.commit()
        if self._tokens is None:
            self._tokens = self._new_store(k)
        self.step = step

    def _new_store(self, k: Tensor) -> Store:
        """Return an empty store for tokens like `k`, `[B, H, T, D]`."""
        store = Store(
            self.method,
            backend_for(self.method.packed_format, k.device, k.shape[3]).name,
            shape=(k.shape[0], k.shape[1], k.shape[3]),
            dtype=k.dtype,
            device=k.device,
            min_tokens=self.min_tokens,
            feedback=self._cross.feedback,
        )
        if self.method.window is not None and self.method.pins != "none":
            store.move = self._cross.mover(self.statistics)
        return store

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
        self.note(seen)
        out = self._step(q, seen, sinks, scale=scale, window=window, softcap=softcap)
        if out is not None:
            return out
        store = self._store()
        bias = None if self.pin_bias is None else self.pin_bias.to(q.device).expand(q.shape[1])
        full, at = store.full_tokens(pin_bias=bias), self._query_positions(q)
        if self.step is not None:
            k, v = self.step.inside(self._cross, self._query_positions(self.step.k))
            full += pins.step_tokens(k, v, self._query_positions(k), self.method.pinning, bias=bias)
        out = store.backend.attend(
            q,
            q_positions=at,
            packed=store.packed_tokens(),
            full=full,
            scale=scale,
            mask=None if seen is None else store.mask_of(seen.mask),
            window=window,
            softcap=softcap,
            sinks=sinks,
            hadamard_block=self._cross.k_block,
            balance=self._cross.k_vector,
            rotate_output=self._cross.v_block is not None,
            key_bias=self._cross.key_bias,
        )
        self.packed_reads += 1
        self.settle()
        return self._cross.leave_output(out)

    def _step(self, q: Tensor, seen: masks.Seen | None, sinks: Tensor | None, **options: object) -> Tensor | None:
        """Attend and settle in one call of the backend; None if this is not a plain step of one token each."""
        step, masked = self.step, seen is not None and seen.mask is not None
        waits = self.records_past or not self.pack_after_attend or self.chooser is not None
        if step is None or step.kept is not None or masked or waits or (q.shape[2], self.new) != (1, 1):
            return None
        stepping = self._stepping = self._stepping or self._new_stepping()
        if not step.checked and stepping.will_pack:
            step.check(self._cross, self.method.packed_format)
            stepping.check_waiting()
        out = stepping.run(q, step.k, step.v, sinks=sinks, **options)
        if out is not None:
            self.step = None
            if not stepping.recording:
                self._took_one()
        return out

    def _took_one(self) -> None:
        self._slots.append(1, None)
        self.packed_reads += 1

    def _new_stepping(self) -> Stepping:
        return Stepping(self._store(), self._cross, pin_bias=self.pin_bias)

    def _end_stepping(self) -> None:
        """Leave the store as its counts say, and free; whoever changes it comes here first."""
        if self._stepping is not None:
            self._stepping.end()
            self._stepping = None

    def reserve(self, steps: int, *, query_heads: int) -> Stepping:
        """Make ready for so many plain steps of one token that are recorded once and then replayed.

        Raises:
            UnsupportedInput: One of them would not be plain. Nothing was changed.
        """
        if self.records_past or not self.pack_after_attend or self.chooser is not None:
            raise UnsupportedInput("packing waits for more than attention here, so steps cannot be recorded.")
        self.commit()
        self._end_stepping()
        self._stepping = stepping = self._new_stepping()  # whatever goes wrong below, it gives its pages back
        stepping.reserve(steps, query_heads=query_heads)
        return stepping

    def finish(self, stepping: Stepping) -> None:
        """End steps that were reserved, if nothing has ended them yet.

        Raises:
            UnsupportedInput: They stored what is no number.
        """
        if self._stepping is stepping:
            self._end_stepping()

    def advance(self) -> None:
        """Count a step that was replayed."""
        if self._stepping is None or not self._stepping.reserved:
            raise UnsupportedInput("the cache has changed since its steps were recorded.")
        self._stepping.advance()
        self._took_one()

    def note(self, seen: masks.Seen | None) -> None:
        """Remember which tokens of the current step are real."""
        if seen is not None and self.step is not None:
            self.step.kept = seen.kept

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
        if self.step is None or not self.pack_after_attend:
            return
        speculative = 1 < self.new < PAGE_TOKENS or (self.records_past and self.new < _LONG_STEP)
        if not speculative:
            self.commit()

    def commit(self) -> None:
        """Append the tokens of the last step to the store; pack what is due."""
        if self.step is None:
            return
        new = self.step.counts()
        if self.chooser is not None and any(self._store().due_after(new)):
            self.adopt(self.chooser.choose(self))
        at, store = self._query_positions(self.step.k), self._store()
        self._end_stepping()
        step, self.step = self.step, None
        try:
            step.check(self._cross, self.method.packed_format)
            store.reserve(new)
            for part in step.slices(None if self.method.window is None else 0):
                kept = None if step.kept is None else step.kept[:, part]
                k, v = step.rotated or enter(self._cross, step.k[:, :, part], step.v[:, :, part], at[:, part])
                store.append(k, v, kept=kept)
        except UnsupportedInput:
            store.pool.drop_free_slabs()
            self._tokens = store if self._slots.count else None
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
        statistics = None if self.statistics is None else self.statistics.used_by(method)
        if self._tokens is None:
            self.method, self.statistics = method, statistics
            return
        self._end_stepping()
        old, crossing = self._tokens.residual_k, method.crossing(self._tokens.residual_k, statistics)
        rows = [crossing.enter(k, v, pins.count(k)) for k, v in map(self.read, range(self.batch))]
        self.method, self.statistics, self._crossing = method, statistics, crossing
        self._tokens = self._new_store(old)
        k, v, kept = padded(rows)
        self._tokens.append(k.to(old), v.to(old), kept=kept)
        if self.step is not None:
            self.step.rotated = None

    def forget_step(self) -> None:
        """Drop the tokens of the current step, after an error."""
        self.step = None

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was (beam search, several return sequences).

        Raises:
            UnsupportedInput: A row does not exist. Nothing was changed.
        """
        if self._tokens is None:
            return
        if not rows or min(rows) < -self.batch or max(rows) >= self.batch:
            raise UnsupportedInput(
                f"rows are {list(rows)}; allowed: at least one row, each below the batch size {self.batch}."
            )
        chosen = [row % self.batch for row in rows]
        index = torch.tensor(chosen, device=self._tokens.residual_k.device)
        self._end_stepping()
        self._tokens.select(chosen)
        self._slots.select(index)
        if self.step is not None:
            self.step = self.step.select(index)

    def remove(self, count: int) -> None:
        """Forget the newest `count` slots. Below the residual whole groups are freed and the cut one is decoded.

        Raises:
            UnsupportedInput: `count` is negative or more than is held. Nothing was changed.
        """
        if not 0 <= count <= self.length:
            raise UnsupportedInput(f"cannot remove {count} tokens; allowed: 0 to the {self.length} held.")
        taken = min(count, self.new)
        if count > taken:
            self._end_stepping()
            self.lossy_crops += self._store().remove(self._slots.newest(count - taken, self.batch))
            self._slots.remove(count - taken)
        if self.step is not None and taken:
            self.step = self.step.without_newest(taken)

    def reset(self) -> None:
        """Forget everything, the batch size included."""
        if self._stepping is not None:
            self._stepping.stepper = None
        self._tokens = self.step = self._stepping = None
        self._slots, self.records_past = Slots(), False
        self.dense_reads = self.packed_reads = self.lossy_crops = 0
