"""The tokens of the current step, which wait in model space until attention has used them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from occamkv.errors import CacheMismatch
from occamkv.formats import PAGE_TOKENS, Format
from occamkv.formats.records import LARGEST_TOKEN, check_storable
from occamkv.methods.crossing import Crossing
from occamkv.methods.method import check_finite

_SLICE_VALUES, _DEVICE_SLICE_VALUES = 2**18, 2**24  # K values that are rotated and appended at a time


@dataclass
class Waiting:
    """Tokens of the current step, `[B, H, T, D]` in model space; `kept`: which are real (None: all, or not known).

    A short step keeps what `inside` made of it, because attention and append both need it. `checked`: its values were
    looked at.
    """

    k: Tensor
    v: Tensor
    kept: Tensor | None = None
    rotated: tuple[Tensor, Tensor] | None = None
    checked: bool = False

    def check(self, crossing: Crossing, format: Format) -> None:
        """Raise `UnsupportedInput` unless its values can be packed, whatever group they will share."""
        if self.checked:
            return
        check_finite(self.k, self.v)
        if crossing.bound(self.k, self.v) > LARGEST_TOKEN:  # only values near the limit need to be rotated to know
            at = torch.arange(self.k.shape[2], device=self.k.device).expand(self.k.shape[0], -1)
            check_storable(*enter(crossing, self.k, self.v, at), format=format)
        self.checked = True

    def inside(self, crossing: Crossing, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V in cache space, in the model's dtype; `at`: their positions, int64 `[B, T]`."""
        made = self.rotated or enter(crossing, self.k, self.v, at)
        if self.k.shape[2] < PAGE_TOKENS:
            self.rotated = made
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of K and V, in model space and as `rotated` holds them."""
        return sum(t.nbytes for t in (self.k, self.v, *(self.rotated or ())))

    def counts(self) -> list[int]:
        """Return how many real tokens each sequence gets."""
        return [self.k.shape[2]] * self.k.shape[0] if self.kept is None else self.kept.sum(1).tolist()

    def slices(self, values: int | None = None) -> list[slice]:
        """Cut a long step into parts of about `values` K values, whole pages; the bytes do not depend on the cuts.

        None: as many as keep the workspace small beside what the device has, few enough launches on a GPU.
        """
        if values is None:
            values = _SLICE_VALUES if on_host(self.k) else _DEVICE_SLICE_VALUES
        tokens = self.k.shape[2]
        at_once = max(PAGE_TOKENS, values // self.k[:, :, 0].numel() // PAGE_TOKENS * PAGE_TOKENS)
        return [slice(first, min(first + at_once, tokens)) for first in range(0, tokens, at_once)]

    def first_real(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the first real tokens of a sequence, at most `count`: float32 `[1, H, n, D]`."""
        real = slice(count) if self.kept is None else self.kept[row].nonzero()[:count, 0]
        return self.k[row, :, real][None].float(), self.v[row, :, real][None].float()

    def select(self, index: Tensor) -> Waiting:
        """Return the step of these sequences, int64 `[n]`."""
        return Waiting(self.k[index], self.v[index], None if self.kept is None else self.kept[index])

    def without_newest(self, count: int) -> Waiting | None:
        """Return the step without its newest tokens; None if none is left."""
        rest = self.k.shape[2] - count
        kept = None if self.kept is None else self.kept[:, :rest]
        return Waiting(self.k[:, :, :rest], self.v[:, :, :rest], kept) if rest else None


def on_host(x: Tensor) -> bool:
    """Tell whether the numbers of a tensor can be looked at without waiting for a device."""
    return x.device.type == "cpu"


def enter(crossing: Crossing, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Take K and V `[B, H, T, D]` at positions `at`, int64 `[B, T]`, to cache space, in their own dtype."""
    inside_k, inside_v = crossing.enter(k, v, at)
    return inside_k.to(k.dtype), inside_v.to(v.dtype)


def check_same(k: Tensor, held: Tensor) -> None:
    """Raise `CacheMismatch` unless K of a step, `[B, H, T, D]`, goes with what a cache holds, `[B, H, n, D]`."""
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


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack K and V of sequences, each `[1, H, n, D]`, with zeros behind the shorter ones.

    Returns:
        K and V `[B, H, T, D]`, and which tokens are real, bool `[B, T]`.
    """
    counts = torch.tensor([k.shape[2] for k, _ in rows])
    k, v = (
        torch.cat([torch.nn.functional.pad(x, (0, 0, 0, int(counts.max()) - x.shape[2])) for x in side])
        for side in zip(*rows, strict=True)
    )
    return k, v, (torch.arange(int(counts.max())) < counts[:, None]).to(k.device)
