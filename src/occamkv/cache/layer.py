"""The cache of one layer: where K, V and queries cross from model space to cache space and back.

Tokens of the current step wait in model space until an attention call has shown which of them are pads; then they are
rotated once and appended to the store. What is due is packed after the attention that used it in full precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from occamkv import ops
from occamkv.cache import masks
from occamkv.cache.heap import give_back
from occamkv.cache.store import Store
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.records import LARGEST_TOKEN, check_storable
from occamkv.kernels import Backend, FullTokens, backend_for
from occamkv.methods import Method
from occamkv.methods.method import check_kv, checked_balance

_SLICE_VALUES = 2**18  # K values that are rotated and appended at a time
_LONG_STEP = 8 * PAGE_TOKENS  # a prompt, not speculation; its freed memory is given back to the system


@dataclass
class _Waiting:
    """Tokens of the current step, `[B, H, T, D]` in model space; `kept`: which are real (None: all, or not known).

    A short step keeps what `rotated` made of it, because attention and append both need it.
    """

    k: Tensor
    v: Tensor
    kept: Tensor | None = None
    rotated: tuple[Tensor, Tensor] | None = None


class LayerCache:
    """Pages, residual and pins of one layer, behind `update`, `attend` and `dense`.

    Args:
        method: How tokens are packed.
        balance: d, `[H, D]`, for a balanced rotation.
        min_tokens: Nothing is packed below this many tokens.
        pack_after_attend: False delays packing to the next step, for engines that read one K and V several times in
            a step (layers that share their cache).
    """

    def __init__(
        self,
        method: Method,
        *,
        balance: Tensor | None = None,
        min_tokens: int = 0,
        pack_after_attend: bool = True,
    ) -> None:
        self.method, self.balance, self.min_tokens = method, balance, min_tokens
        self.pack_after_attend = pack_after_attend
        self.records_past = False
        self.dense_reads = self.packed_reads = self.lossy_crops = self._held = 0
        self.store: Store | None = None
        self._waiting: _Waiting | None = None
        self._kept: Tensor | None = None

    @property
    def length(self) -> int:
        """Slots seen by the engine, pads and the current step included."""
        return self._held + (0 if self._waiting is None else self._waiting.k.shape[2])

    @property
    def new(self) -> int:
        """Slots of the current step."""
        return 0 if self._waiting is None else self._waiting.k.shape[2]

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first update."""
        return 0 if self.store is None else len(self.store.rows)

    @property
    def backend(self) -> Backend:
        """The backend that reads the records."""
        return self._store().backend

    @property
    def waiting(self) -> tuple[Tensor, Tensor] | None:
        """K and V of a first step that nothing else has to be read with, `[B, H, T, D]` in model space; else None."""
        return (self._waiting.k, self._waiting.v) if self._waiting is not None and not self._held else None

    def nbytes(self) -> dict[str, int]:
        """Return the bytes held: `packed`, `residual` (the current step included), `pins`."""
        held = {"packed": 0, "residual": 0, "pins": 0} if self.store is None else self.store.nbytes()
        if self._waiting is not None:
            step = (self._waiting.k, self._waiting.v, *(self._waiting.rotated or ()))
            held["residual"] += sum(t.nbytes for t in step)
        if self._kept is not None:
            held["residual"] += self._kept.nbytes
        return held

    @property
    def packing_starts(self) -> int:
        """Number of tokens at which the first group of a sequence is packed."""
        return max(self.method.pinned_tokens + PAGE_TOKENS, self.min_tokens)

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
            self._check_same(k)
        elif self.balance is not None:
            self.balance = checked_balance(self.method, self.balance, k)
        if k.shape[2] == 0:
            return
        step = _Waiting(k, v)
        self._check_storable(step)
        self.commit()
        if self.store is None:
            backend = backend_for(self.method.packed_format, k.device).name
            shape = (k.shape[0], k.shape[1], k.shape[3])
            self.store = Store(
                self.method, backend, shape=shape, dtype=k.dtype, device=k.device, min_tokens=self.min_tokens
            )
        self._waiting = step

    def _check_storable(self, step: _Waiting) -> None:
        """Refuse tokens that could not be packed; only values near the limit need to be rotated to know."""
        k_block, v_block = self.method.hadamard_blocks(step.k.shape[3])
        stretch = 1.0 if self.balance is None else float(self.balance.max())
        k, v = (max(abs(float(x)) for x in t.aminmax()) for t in (step.k, step.v))
        longest = k * stretch * (k_block or 1) ** 0.5 * (step.k.shape[1] * step.k.shape[3]) ** 0.5
        if max(longest, v * (v_block or 1) ** 0.5) > LARGEST_TOKEN:
            check_storable(*self._rotated(step), format=self.method.packed_format)

    def _check_same(self, k: Tensor) -> None:
        held = self._store().residual_k
        for what, given, wanted in (
            ("batch size", k.shape[0], held.shape[0]),
            ("number of KV heads", k.shape[1], held.shape[1]),
            ("head_dim", k.shape[3], held.shape[3]),
            ("dtype", k.dtype, held.dtype),
            ("device", k.device, held.device),
        ):
            if given != wanted:
                raise CacheMismatch(
                    f"the {what} of this call is {given}, the cache holds {wanted}. Nothing was stored. "
                    "Use a new cache, or reset() this one (select, repeat and reorder change the batch)."
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
        k_block, v_block = self.method.hadamard_blocks(q.shape[3])
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
            hadamard_block=k_block,
            balance=self.balance,
            rotate_output=v_block is not None,
        )
        self.packed_reads += 1
        self.settle()
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
            masks.refuse_right_padding(kept, self.slots_before(self.new), self._held)
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
        step, self._waiting = self._waiting, None
        store = self._store()
        store.reserve([step.k.shape[2]] * self.batch if step.kept is None else step.kept.sum(1).tolist())
        try:
            for part in self._slices(step):
                kept = None if step.kept is None else step.kept[:, part]
                whole = step.rotated is not None
                k, v = self._rotated(step) if whole else self._rotate(step.k[:, :, part], step.v[:, :, part])
                store.append(k, v, kept=kept)
        except UnsupportedInput:
            store.pool.drop_free_slabs()
            self.store = store if self._held else None
            raise
        if step.kept is not None:  # slots behind the last pad are not noted: they are all real
            self._kept = torch.cat((self._noted(self._held), step.kept), dim=1)
        self._held += step.k.shape[2]
        if step.k.shape[2] >= _LONG_STEP and step.k.device.type == "cpu":
            give_back()

    def _slices(self, step: _Waiting) -> list[slice]:
        """Cut a long step, so that temporaries stay small; the bytes do not depend on the cuts."""
        tokens = step.k.shape[2]
        at_once = max(PAGE_TOKENS, _SLICE_VALUES // step.k[:, :, 0].numel() // PAGE_TOKENS * PAGE_TOKENS)
        return [slice(first, min(first + at_once, tokens)) for first in range(0, tokens, at_once)]

    def _noted(self, length: int) -> Tensor:
        """Return which of the first `length` slots hold real tokens, bool `[B, length]`."""
        noted = 0 if self._kept is None else min(self._kept.shape[1], length)
        real = torch.ones(self.batch, length, dtype=torch.bool, device=self._store().residual_k.device)
        if self._kept is not None:
            real[:, :noted] = self._kept[:, :noted]
        return real

    def forget_step(self) -> None:
        """Drop the tokens of the current step, after an error."""
        self._waiting = None

    def _rotated(self, step: _Waiting) -> tuple[Tensor, Tensor]:
        """Return the step's K and V in cache space, in the model's dtype."""
        if step.rotated is not None:
            return step.rotated
        made = self._rotate(step.k, step.v)
        if step.k.shape[2] < PAGE_TOKENS:
            step.rotated = made
        return made

    def _rotate(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k_block, v_block = self.method.hadamard_blocks(k.shape[3])
        rotated = ops.rotate(k, hadamard_block=k_block, balance=self.balance).to(k.dtype)
        return rotated, ops.rotate(v, hadamard_block=v_block).to(v.dtype)

    def _query_positions(self, q: Tensor) -> Tensor:
        real = self.real_slots()
        if real is None:
            return torch.arange(self.length - q.shape[2], self.length, device=q.device).expand(q.shape[0], -1)
        return masks.query_positions(real, q.shape[2])

    def real_slots(self) -> Tensor | None:
        """Return which slots hold real tokens, bool `[B, S]`, or None when all do (or nothing is known of them yet)."""
        new = None if self._waiting is None else self._waiting.kept
        if self._kept is None and new is None:
            return None
        if new is None:
            return self._noted(self.length)
        return torch.cat((self._noted(self._held), new), dim=1)

    def slots_before(self, new: int) -> Tensor | None:
        """Return `real_slots` without the newest `new` slots."""
        real = self.real_slots()
        return None if real is None else real[:, : self.length - new]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return all K and V dequantized, `[B, H, S, D]` in model space and dtype; earlier pads are zeros."""
        self.dense_reads += 1
        if self.waiting is not None:
            return self.waiting
        store = self._store()
        template = store.residual_k
        batch, heads, _, head_dim = template.shape
        k = template.new_zeros(batch, heads, self._held, head_dim)
        v = torch.zeros_like(k)
        k_block, v_block = self.method.hadamard_blocks(head_dim)
        for row in range(batch):
            row_k, row_v = (x[None] for x in store.read(row))
            row_k = ops.rotate_back(row_k, hadamard_block=k_block, balance=self.balance)[0].to(k.dtype)
            row_v = ops.rotate_back(row_v, hadamard_block=v_block)[0].to(k.dtype)
            at = slice(None) if self._kept is None else self._noted(self._held)[row].nonzero()[:, 0]
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
        self._kept = None if self._kept is None else self._kept[index]
        if self._waiting is not None:
            kept = self._waiting.kept
            self._waiting = _Waiting(
                self._waiting.k[index], self._waiting.v[index], None if kept is None else kept[index]
            )

    def remove(self, count: int) -> None:
        """Forget the newest `count` slots. Below the residual whole groups are freed and the cut one is decoded.

        Raises:
            UnsupportedInput: `count` is negative or more than is held. Nothing was changed.
        """
        if not 0 <= count <= self.length:
            raise UnsupportedInput(f"cannot remove {count} tokens; allowed: 0 to the {self.length} held.")
        if self._waiting is not None and count:
            taken = min(count, self._waiting.k.shape[2])
            rest = self._waiting.k.shape[2] - taken
            kept = self._waiting.kept
            new = _Waiting(
                self._waiting.k[:, :, :rest], self._waiting.v[:, :, :rest], None if kept is None else kept[:, :rest]
            )
            self._waiting = new if rest else None
            count -= taken
        if not count:
            return
        self._held -= count
        counts = [count] * self.batch
        if self._kept is not None:
            counts = self._noted(self._held + count)[:, self._held :].sum(1).tolist()
            self._kept = self._kept[:, : self._held]
        self.lossy_crops += self._store().remove(counts)

    def reset(self) -> None:
        """Forget everything, the batch size included."""
        self.store = self._waiting = self._kept = None
        self._held, self.records_past = 0, False
        self.dense_reads = self.packed_reads = self.lossy_crops = 0

    def _store(self) -> Store:
        if self.store is None:
            raise UnsupportedInput("the cache is empty: call update(k, v) before attention reads it.")
        return self.store
