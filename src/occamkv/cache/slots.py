"""Which slots of an engine's sequences hold real tokens; the others are pads, which are not stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Slots:
    """The slots that a layer has taken in.

    `count` is their number. `kept`, bool `[B, n]`, says of the first n which are real; slots behind the last pad are
    not noted: they are all real. None: there are no pads.
    """

    def __init__(self) -> None:
        self.count = 0
        self.kept: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.kept is None else self.kept.nbytes

    def real(self, length: int, *, like: Tensor) -> Tensor:
        """Return which of the first `length` slots are real, bool `[B, length]`, B and device those of `like`."""
        real = torch.ones(like.shape[0], length, dtype=torch.bool, device=like.device)
        if self.kept is not None:
            noted = min(self.kept.shape[1], length)
            real[:, :noted] = self.kept[:, :noted]
        return real

    def spread(self, rows: Sequence[tuple[Tensor, Tensor]], *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Put K and V of each sequence, `[1, H, n, D]`, at its real slots: `[B, H, S, D]`; dtype and device of `like`.

        Pads are zeros.
        """
        k = like.new_zeros(*like.shape[:2], self.count, like.shape[3])
        v, real = torch.zeros_like(k), None if self.kept is None else self.real(self.count, like=like)
        for row, (row_k, row_v) in enumerate(rows):
            at = slice(None) if real is None else real[row].nonzero()[:, 0]
            k[row][:, at], v[row][:, at] = row_k[0].to(k.dtype), row_v[0].to(k.dtype)
        return k, v

    def with_step(self, new: int, kept: Tensor | None, *, like: Tensor) -> Tensor | None:
        """Return what `real` would be with `new` slots more, of which `kept` are real; None when all slots are."""
        if kept is not None:
            return torch.cat((self.real(self.count, like=like), kept), dim=1)
        return None if self.kept is None else self.real(self.count + new, like=like)

    def append(self, new: int, kept: Tensor | None) -> None:
        """Add `new` slots; `kept`, bool `[B, new]`, says which are real, None: all."""
        if kept is not None:
            self.kept = torch.cat((self.real(self.count, like=kept), kept), dim=1)
        self.count += new

    def select(self, index: Tensor) -> None:
        """Make sequence i what sequence `index[i]` was, int64 `[n]`."""
        self.kept = None if self.kept is None else self.kept[index]

    def newest(self, new: int, batch: int) -> list[int]:
        """Return how many real tokens of each of `batch` sequences are in the newest `new` slots."""
        if self.kept is None:
            return [new] * batch
        counts = self.real(self.count, like=self.kept)[:, self.count - new :].sum(1).tolist()
        return [int(count) for count in counts]

    def remove(self, new: int) -> None:
        """Forget the newest `new` slots."""
        self.count -= new
        self.kept = None if self.kept is None else self.kept[:, : self.count]
