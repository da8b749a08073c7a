"""The tokens of one layer, in cache space: pins, pages and residual of every sequence.

Sequences of a batch are independent: each has its own pages, counts and flushes, so a batch of N holds the same bytes
as N batches of 1. A sequence's real tokens (pads are none) are numbered from 0; that number is the *position*.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from occamkv import kernels
from occamkv.cache import pins
from occamkv.cache.pool import PagePool
from occamkv.cache.row import Change, Row
from occamkv.errors import UnsupportedInput
from occamkv.formats import PAGE_TOKENS
from occamkv.formats.records import Records, from_groups, pages_of, to_groups
from occamkv.kernels import Backend, FullTokens, PackedTokens
from occamkv.kernels.contract import positions_of
from occamkv.methods import Method


class Store:
    """Pins, pages and residual of B sequences of one layer.

    Args:
        method: How tokens are packed; not `full`.
        backend: Name of the backend that encodes and reads records.
        shape: `(B, H, D)`.
        dtype: Dtype of residual and pins, the model's.
        device: Where all tensors live.
        min_tokens: Nothing of a sequence is packed before it holds this many tokens.
        feedback: F, `[H, D, D]`, for methods with error feedback.

    `move(k, old, new)` takes K of pins, `[B, H, P, D]`, from positions `old` to `new`, int64 `[B, P]`; a method with a
    window needs it.
    """

    def __init__(
        self,
        method: Method,
        backend: str,
        *,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        min_tokens: int = 0,
        feedback: Tensor | None = None,
    ) -> None:
        batch, heads, head_dim = shape
        self.method, self.backend_name, self.min_tokens, self.feedback = method, backend, min_tokens, feedback
        self.move: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.format = method.packed_format
        self.rows = [Row() for _ in range(batch)]
        order = self.backend.order
        self.pool = PagePool(format=self.format, kv_heads=heads, head_dim=head_dim, device=device, order=order)
        self.pinning, self.ring_slots = method.pinning, method.residual_tokens
        ring, pinned = ((batch, heads, tokens, head_dim) for tokens in (self.ring_slots, method.pin_slots))
        self.residual_k, self.residual_v = (torch.zeros(ring, dtype=dtype, device=device) for _ in range(2))
        self.pin_k, self.pin_v = (torch.zeros(pinned, dtype=dtype, device=device) for _ in range(2))

    @property
    def backend(self) -> Backend:
        """The backend that encodes and reads records."""
        return kernels.backend(self.backend_name)

    def nbytes(self) -> dict[str, int]:
        """Return the bytes held: `packed`, `residual`, `pins`."""
        return {
            "packed": self.pool.nbytes,
            "residual": self.residual_k.nbytes + self.residual_v.nbytes,
            "pins": self.pin_k.nbytes + self.pin_v.nbytes,
        }

    def append(self, k: Tensor, v: Tensor, *, kept: Tensor | None = None) -> None:
        """Add tokens and pack what is due.

        Args:
            k: `[B, H, T, D]` in cache space and in the residual's dtype.
            v: The same shape.
            kept: bool `[B, T]`, False for pads, which are dropped; None when there are none.

        Raises:
            UnsupportedInput: A token cannot be packed. Nothing was changed.
        """
        changes = [
            self._prepare(
                rows, *(x[rows.start : rows.stop] if at is None else x[rows.start][None, :, at] for x in (k, v))
            )
            for rows, at in self._cuts(kept)
        ]
        self._resize(changes)
        for change in changes:
            self._apply(change)

    def due_after(self, new: Sequence[int]) -> list[int]:
        """Return how many tokens of each sequence are due with `new[b]` more of them, if none is found to be pinned."""
        due = []
        for row, count in zip(self.rows, new, strict=True):
            leaving = len(self.pinning.among(row.tokens, row.tokens + count)) + (0 if row.pins else self.pinning.lowest)
            due.append(self._due(row, row.residual + count - leaving, row.tokens + count))
        return due

    def reserve(self, new: Sequence[int]) -> None:
        """Allocate at once the pages that `new[b]` more tokens of each sequence will fill."""
        if self.method.window is not None:
            return  # pages that leave the window make room
        due = zip(self.rows, self.due_after(new), strict=True)
        self.pool.reserve(sum(pages_of(row.packed + count) - len(row.pages) for row, count in due))

    def _cuts(self, kept: Tensor | None) -> Iterator[tuple[range, Tensor | None]]:
        """Yield rows that can be handled together, and which of the new tokens are theirs (None: all)."""
        alike = len({row.counts for row in self.rows}) == 1 and not (self.pinning.finds and len(self.rows) > 1)
        if kept is None and alike:
            yield range(len(self.rows)), None
            return
        for index in range(len(self.rows)):
            yield range(index, index + 1), None if kept is None else kept[index].nonzero()[:, 0]

    def _prepare(self, rows: range, k: Tensor, v: Tensor) -> Change:
        row = self.rows[rows.start]
        tokens = row.tokens + k.shape[2]
        pinned = list(self.pinning.among(row.tokens, tokens))
        (pin_k, k), (pin_v, v) = (pins.split(x, [position - row.tokens for position in pinned]) for x in (k, v))
        residual, staged, records = row.residual + k.shape[2], row.staged, None
        due = self._due(row, residual, tokens)
        replaces = bool(due or residual > self.residual_k.shape[2])
        if replaces:
            old_k, old_v = self._ring(rows)
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
            if due and self.pinning.finds:
                before = row.pins + pinned
                found, due, staged = pins.route(
                    self.method,
                    k[0],
                    v[0],
                    judged=staged,
                    pinned=self._found(before),
                    before=row.packed + self._found(before),
                )
                pinned += [pins.position(row.packed + index, before) for index in found]
                (found_k, k), (found_v, v) = (pins.split(x, found) for x in (k, v))
                pin_k, pin_v = torch.cat((pin_k, found_k), dim=2), torch.cat((pin_v, found_v), dim=2)
            records = self._encode(k[:, :, :due], v[:, :, :due]) if due else None
            k, v = k[:, :, due:], v[:, :, due:]
            residual = k.shape[2]
        return Change(rows, pinned, pin_k, pin_v, records, k, v, replaces, residual, staged)

    def _found(self, pinned: Sequence[int]) -> int:
        """Return how many of these pins were found by their norms."""
        return len(set(pinned).difference(self.pinning.positions))

    def _due(self, row: Row, waiting: int, tokens: int) -> int:
        """Return how many of the `waiting` oldest unpacked of `tokens` tokens must be packed, if none is pinned."""
        if waiting - row.staged < PAGE_TOKENS or (not row.packed and tokens < self.min_tokens):
            return 0
        step = self.method.flush_tokens
        return (row.staged + ((waiting - row.staged - PAGE_TOKENS) // step + 1) * step) // step * step

    def _encode(self, k: Tensor, v: Tensor) -> Records:
        tokens = self.format.record_tokens
        groups = (to_groups(k, tokens), to_groups(v, tokens))
        method = self.method
        return self.backend.encode(
            *groups, format=self.format, grid=method.grid, clip=method.clip, norm=method.norm, feedback=self.feedback
        )

    def _apply(self, change: Change) -> None:
        rows, row = change.rows, self.rows[change.rows.start]
        span = slice(rows.start, rows.stop)
        slots = slice(row.pinned, row.pinned + len(change.pins))
        if slots.stop > self.pin_k.shape[2]:
            room = -(-(slots.stop - self.pin_k.shape[2]) // pins.PIN_SLOTS) * pins.PIN_SLOTS
            self.pin_k, self.pin_v = (torch.nn.functional.pad(p, (0, 0, 0, room)) for p in (self.pin_k, self.pin_v))
        self.pin_k[span, :, slots], self.pin_v[span, :, slots] = change.pin_k, change.pin_v
        done = row.packed if change.records is None else self._write(change.records, rows, row.packed)
        first = done if change.rest_replaces else row.packed + row.residual
        ring = torch.arange(first, first + change.rest_k.shape[2], device=self.residual_k.device)
        ring %= self.residual_k.shape[2]
        self.residual_k[span, :, ring], self.residual_v[span, :, ring] = change.rest_k, change.rest_v
        for index in rows:
            held = self.rows[index]
            held.pins = held.pins + change.pins
            held.packed, held.residual, held.staged = done, change.residual, change.staged

    def _write(self, records: Records, rows: range, done: int) -> int:
        """Put records of these rows behind their `done` packed tokens; return the new count."""
        tokens, per_page = self.format.record_tokens, self.format.page_records
        groups = records.data.shape[0] // len(rows)
        pages, slots = [], []
        for index in rows:
            self._drop(self.rows[index], done + groups * tokens)
            own = self.rows[index].pages
            if done % PAGE_TOKENS and self.pool.shared(own[-1]):
                own[-1] = self.pool.duplicate(own[-1])
        dropped = self.rows[rows.start].dropped
        wanted = pages_of(done + groups * tokens - dropped)
        fresh = self.pool.allocate(sum(wanted - len(self.rows[index].pages) for index in rows))
        for index in rows:
            own = self.rows[index].pages
            missing = wanted - len(own)
            own += fresh[:missing]
            fresh = fresh[missing:]
            for group in range((done - dropped) // tokens, (done - dropped) // tokens + groups):
                pages.append(own[group // per_page])
                slots.append(group % per_page)
        self.pool.write(records, pages=pages, slots=slots)
        return done + groups * tokens

    def _drop(self, row: Row, packed: int) -> None:
        """Give back the pages that are behind the window once `packed` tokens are packed."""
        behind = min(self.method.dropped_tokens(packed), row.packed // PAGE_TOKENS * PAGE_TOKENS) - row.dropped
        if behind > 0:
            freed, row.pages = row.pages[: behind // PAGE_TOKENS], row.pages[behind // PAGE_TOKENS :]
            row.dropped += behind
            self.pool.release(freed)

    def _ring(self, rows: range) -> tuple[Tensor, Tensor]:
        """Copy out the residual of rows with equal counts, oldest token first."""
        row = self.rows[rows.start]
        slots = torch.arange(row.packed, row.packed + row.residual, device=self.residual_k.device)
        slots %= self.residual_k.shape[2]
        span = slice(rows.start, rows.stop)
        return self.residual_k[span, :, slots], self.residual_v[span, :, slots]

    def _resize(self, changes: Sequence[Change]) -> None:
        """Give the ring as many slots as the fullest sequence will need; always the least but for `min_tokens`."""
        most = max(change.residual for change in changes)
        wanted = self.ring_slots if most <= self.ring_slots else PAGE_TOKENS * pages_of(most)
        if wanted == self.residual_k.shape[2] or not any(change.rest_replaces for change in changes):
            return
        kept = [change.rows for change in changes if not change.rest_replaces]
        old = [self._ring(rows) for rows in kept]
        shape = (*self.residual_k.shape[:2], wanted, self.residual_k.shape[3])
        self.residual_k, self.residual_v = self.residual_k.new_zeros(shape), self.residual_v.new_zeros(shape)
        for rows, (k, v) in zip(kept, old, strict=True):
            row, span = self.rows[rows.start], slice(rows.start, rows.stop)
            slots = torch.arange(row.packed, row.packed + row.residual, device=self.residual_k.device) % wanted
            self.residual_k[span, :, slots], self.residual_v[span, :, slots] = k, v

    def found_pins(self) -> int:
        """Return how many tokens of all sequences are pinned because of their norms."""
        return sum(self._found(row.pins) for row in self.rows)

    def packed_tokens(self) -> PackedTokens | None:
        """Describe the packed tokens to a backend; None when there are none."""
        if not any(row.held for row in self.rows):
            return None
        longest = max(len(row.pages) for row in self.rows)
        table = [row.pages + [self.pool.starts[0]] * (longest - len(row.pages)) for row in self.rows]
        lengths, first, numbers = (
            torch.tensor(values, dtype=torch.int64, device=self.pool.device)
            for values in ([row.held for row in self.rows], [self.first_number(row) for row in self.rows], table)
        )
        return PackedTokens(
            slabs=self.pool.slabs,
            starts=self.pool.starts,
            table=numbers,
            lengths=lengths,
            first_position=first,
            skips=self.skips(),
        )

    def first_number(self, row: Row) -> int:
        """Return the position of the first packed token that is held, pins in between left out: `skips` tells them."""
        return row.dropped + self._leading(row)

    def _leading(self, row: Row) -> int:
        """Return how many pins lie before all stream tokens; where they may lie between, `skips` tells it."""
        return 0 if self.pinning.scatters else row.pinned

    def skips(self) -> Tensor | None:
        """Return the table of `pins.skip_table`, or None for methods that pin nothing but first tokens."""
        return pins.skip_table([row.pins for row in self.rows], self.pool.device) if self.pinning.scatters else None

    def pinned(self) -> FullTokens:
        """Describe the pins to a backend; behind a window they stand just before it."""
        old = [row.pins for row in self.rows]
        at, new = pins.pinned_tokens(self.pin_k, self.pin_v, old), self._standing()
        if self.move is None or new == old:
            return at
        to = pins.pinned_tokens(self.pin_k, self.pin_v, new)
        return replace(to, k=self.move(self.pin_k, at.positions, to.positions))

    def _standing(self) -> list[list[int]]:
        """Return the positions at which the pins of each sequence stand."""
        if self.move is None:
            return [row.pins for row in self.rows]
        return [pins.standing(row.pins, pins.position(row.dropped, row.pins)) for row in self.rows]

    def mask_of(self, mask: Tensor | None) -> Tensor | None:
        """Return a mask over positions that shows pins, wherever they stand, as it shows the places they came from."""
        old, new = [row.pins for row in self.rows], self._standing()
        return mask if mask is None or new == old else pins.moved_mask(mask, old, new)

    def full_tokens(self, *, pin_bias: Tensor | None = None) -> list[FullTokens]:
        """Describe pins and residual to a backend; `pin_bias`, `[Hq]`, is added to the logits of pins."""
        device, parts = self.pool.device, []
        if any(row.pins for row in self.rows):
            parts.append(replace(self.pinned(), logit_bias=pin_bias))
        if any(row.residual for row in self.rows):
            counts = [(self._leading(row), row.packed, row.residual) for row in self.rows]
            leading, packed, residual = torch.tensor(counts, dtype=torch.int64, device=device)[:, :, None].unbind(1)
            behind = (torch.arange(self.residual_k.shape[2], device=device) - packed) % self.residual_k.shape[2]
            numbers, skipped = behind + packed, self.skips()
            positions = numbers + leading if skipped is None else positions_of(numbers, skipped)
            parts.append(FullTokens(self.residual_k, self.residual_v, positions.masked_fill(behind >= residual, -1)))
        return parts

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Return K and V of one sequence in order of position, dequantized: float32 `[H, n, D]` in cache space.

        Raises:
            UnsupportedInput: Tokens have left the window.
        """
        counts = self.rows[row]
        if counts.dropped:
            raise UnsupportedInput(
                f"{counts.dropped} tokens have left the window of {self.method.window} and cannot be read back. Use a "
                "model whose attention goes through the interface, and no option that reads K and V themselves."
            )
        k, v = [self.pin_k[row, :, : counts.pinned]], [self.pin_v[row, :, : counts.pinned]]
        packed = self.packed_tokens()
        if packed is not None and counts.packed:
            for parts, pages in zip((k, v), self.backend.decode(packed.gather(counts.pages)), strict=True):
                parts.append(from_groups(pages, 1)[0, :, : counts.packed])
        for parts, ring in zip((k, v), self._ring(range(row, row + 1)), strict=True):
            parts.append(ring[0])
        all_k, all_v = (torch.cat([p.to(torch.float32) for p in parts], dim=1) for parts in (k, v))
        if not self.pinning.scatters:
            return all_k, all_v
        stream = set(range(counts.tokens)).difference(counts.pins)
        order = torch.tensor([*counts.pins, *sorted(stream)], device=all_k.device).argsort()
        return all_k[:, order], all_v[:, order]

    def _read_group(self, row: Row, start: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the page behind packed token `start`, from there on: float32 `[H, n, D]`."""
        packed = self.packed_tokens()
        if packed is None:
            raise UnsupportedInput("no token is packed.")
        k, v = self.backend.decode(packed.gather([row.pages[(start - row.dropped) // PAGE_TOKENS]]))
        return k[0, :, start % PAGE_TOKENS :], v[0, :, start % PAGE_TOKENS :]

    def select(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was; pages are shared, and one still filling is copied before it is written."""
        old = self.rows
        for index in rows:
            self.pool.share(old[index].pages)
        for row in old:
            self.pool.release(row.pages)
        self.rows = [copy.copy(old[index]) for index in rows]
        for row in self.rows:
            row.pages, row.pins = list(row.pages), list(row.pins)
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.pool.device)
        self.residual_k, self.residual_v, self.pin_k, self.pin_v = (
            x.index_select(0, chosen) for x in (self.residual_k, self.residual_v, self.pin_k, self.pin_v)
        )

    def remove(self, counts: Sequence[int]) -> bool:
        """Forget the newest `counts[b]` tokens of each sequence.

        Tokens of the residual go without a trace. Below it whole groups are freed, and what is left of a cut group is
        decoded into the residual, no longer in full precision.

        Returns:
            True if a group had to be decoded.

        Raises:
            UnsupportedInput: What would be the newest tokens then have left the window. Nothing was changed.
        """
        lossy, most = False, min(row.held + row.residual for row in self.rows)
        if max(counts) > most and any(row.dropped for row in self.rows):
            raise UnsupportedInput(
                f"cannot remove {max(counts)} tokens; allowed: up to {most}, which the window holds."
            )
        for index, count in enumerate(counts):
            row = self.rows[index]
            left = row.tokens - count
            row.pins = [position for position in row.pins if position < left]
            keep = left - row.pinned
            row.staged = min(row.staged, max(0, keep - row.packed))
            if keep >= row.packed:
                row.residual = keep - row.packed
                continue
            packed = keep // self.format.record_tokens * self.format.record_tokens
            if keep > packed:
                k, v = (x[:, : keep - packed] for x in self._read_group(row, packed))
                slots = torch.arange(packed, keep, device=self.residual_k.device) % self.residual_k.shape[2]
                self.residual_k[index][:, slots] = k.to(self.residual_k.dtype)
                self.residual_v[index][:, slots] = v.to(self.residual_v.dtype)
                lossy = True
            row.packed, row.residual = packed, keep - packed
            row.staged = row.residual if self.pinning.judges else 0
            held = pages_of(packed - row.dropped)
            freed, row.pages = row.pages[held:], row.pages[:held]
            self.pool.release(freed)
        return lossy
