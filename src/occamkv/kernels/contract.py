"""What every backend is given (where packed and full-precision tokens lie) and what it must offer."""

from bisect import bisect_right
from collections.abc import Sequence
from ctypes import Array, c_int64
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.formats.pages import Pages
from occamkv.formats.records import Records
from occamkv.ops.affine import Grid
from occamkv.ops.norms import Norm
from occamkv.ops.rope import KeyBias


@dataclass(frozen=True)
class PackedTokens:
    """The packed tokens of B sequences of one layer, in cache space.

    Args:
        slabs: Pages, in slabs as they were allocated.
        starts: Number of the first page of each slab; page numbers count through all slabs.
        table: Page numbers, int64 `[B, n]`; entries behind a sequence's last page are the number of
            any page and do not count.
        lengths: Packed tokens of each sequence, int64 `[B]`.
        first_position: Position of the first packed token of each sequence, int64 `[B]` (pins come before it).
        skips: Where tokens in between are pinned, int64 `[B, P]` ascending: packed token n lies `count(skips <= n)`
            positions further back. None when only first tokens are pinned.
    """

    slabs: Sequence[Pages]
    starts: Sequence[int]
    table: Tensor
    lengths: Tensor
    first_position: Tensor
    skips: Tensor | None = None

    @property
    def format(self) -> Format:
        """The format of all slabs."""
        return self.slabs[0].format

    def gather(self, numbers: Sequence[int]) -> Pages:
        """Copy pages with these numbers out of their slabs, in this order.

        Raises:
            UnsupportedInput: A number is in no slab.
        """
        parts: list[Pages] = []
        runs: list[tuple[int, list[int]]] = []
        for number in numbers:
            slab = slab_of(number, self.slabs, self.starts)
            if not runs or runs[-1][0] != slab:
                runs.append((slab, []))
            runs[-1][1].append(number - self.starts[slab])
        for slab, local in runs:
            parts.append(self.slabs[slab].select(torch.tensor(local, device=self.slabs[slab].records.device)))
        return Pages.concatenate(parts)


def slab_of(number: int, slabs: Sequence[Pages], starts: Sequence[int]) -> int:
    """Return which slab has a page.

    Raises:
        UnsupportedInput: None has it.
    """
    slab = bisect_right(starts, number) - 1
    if slab < 0 or number >= starts[slab] + slabs[slab].count:
        raise UnsupportedInput(f"the block table names page {number}, which is in no slab.")
    return slab


def positions_of(numbers: Tensor, skips: Tensor) -> Tensor:
    """Return the positions of tokens, int64 `[B, n]`, from their numbers among those not pinned, `[B, n]`."""
    return numbers + torch.searchsorted(skips.contiguous(), numbers.contiguous(), right=True)


@dataclass(frozen=True)
class FullTokens:
    """Tokens in full precision (residual, pins, or K and V of this step), in cache space.

    Args:
        k: `[B, H, F, D]`.
        v: The same shape.
        positions: int64 `[B, F]`: position of each slot in its sequence, -1 for an empty slot.
        logit_bias: `[Hq]`: added to the logits of all these tokens after scale and soft cap. It moves attention to
            pinned tokens or away from them, head by head (ZeroTuning, Han et al. 2025, arXiv:2505.11739).
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    logit_bias: Tensor | None = None


@dataclass(frozen=True)
class StepLayer:
    """What a backend needs to know of a layer to run whole decode steps: its memory, its counts, how it packs.

    Args:
        slabs: As in `PackedTokens`.
        starts: As in `PackedTokens`.
        tables: Page numbers of each sequence, room for what is due included.
        first_position: As in `PackedTokens`.
        skips: As in `PackedTokens`.
        packed: Packed tokens of each sequence.
        residual: Tokens of each sequence in the ring; token n of the stream lies in slot `n % slots`.
        ring: K and V of the residual, `[B, H, slots, D]` in cache space.
        pins: Pinned tokens in full precision.
        format: What records are.
        flush_tokens: Before it takes a token, a backend that counts on its own packs so many of each sequence with 128
            or more in the ring, whole records; 0 where it must not.
        grid: As in `encode`.
        clip: As in `encode`.
        feedback: As in `encode`.
        hadamard_block: K and Q are rotated in blocks of this size.
        balance: d, `[H, D]`: K is multiplied by it, Q divided.
        rotate_v: V is stored rotated.
        key_bias: As in `attend`. The bias of a step's token is taken out of its K, which comes with it, before K
            crosses into cache space.
    """

    slabs: Sequence[Pages]
    starts: Sequence[int]
    tables: Sequence[Sequence[int]]
    first_position: Sequence[int]
    skips: Tensor | None
    packed: Sequence[int]
    residual: Sequence[int]
    ring: tuple[Tensor, Tensor]
    pins: FullTokens
    format: Format
    flush_tokens: int
    grid: Grid
    clip: float | None
    feedback: Tensor | None
    hadamard_block: int | None
    balance: Tensor | None
    rotate_v: bool
    key_bias: KeyBias | None = None


class Stepper(Protocol):
    """Runs decode steps of a layer: rotate, append, attend and pack in one call.

    `residual` counts the tokens of each sequence in the ring; each step brings it up to date. A step may be recorded
    and replayed without these counts: then its first act packs what the step before left over (`flush_tokens`), by
    counts in the memory of the device, and `settle` packs what the last one left.
    """

    residual: Array[c_int64]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        due: Sequence[int],
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Take one token of every sequence; where a graph is recorded, describe that and pack nothing afterwards.

        Args:
            q: `[B, Hq, 1, D]` in model space.
            k: `[B, H, 1, D]` in model space.
            v: The same shape.
            due: Tokens of each sequence that are packed afterwards, whole records; their pages are in the tables.
            scale: As in `attend`.
            window: As in `attend`.
            softcap: As in `attend`.
            sinks: As in `attend`.

        Returns:
            `[B, Hq, 1, D]` in model space and in the dtype of q.
        """
        ...

    def settle(self) -> None:
        """Pack what is due and bring `residual` up to date, where steps ran without this object: a replayed graph.

        Raises:
            UnsupportedInput: A step could not be stored.
        """
        ...


class Backend(Protocol):
    """The kernels for one kind of device."""

    @property
    def name(self) -> str:
        """Name in reports."""
        ...

    @property
    def order(self) -> str:
        """Order of the bytes within a record, as it writes and reads them; others are refused."""
        ...

    def refuses(self, format: Format, device: torch.device, head_dim: int | None = None) -> str | None:
        """Return why this backend cannot take `format` on `device`, one sentence, or None.

        Without a head_dim, what holds for all of them.
        """
        ...

    def attend(
        self,
        q: Tensor,
        *,
        q_positions: Tensor,
        packed: PackedTokens | None,
        full: Sequence[FullTokens],
        scale: float | None = None,
        mask: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        hadamard_block: int | None = None,
        balance: Tensor | None = None,
        rotate_output: bool = False,
        key_bias: KeyBias | None = None,
    ) -> Tensor:
        """Attend; see `occamkv.kernels.blockwise.attend` for the contract."""
        ...

    def encode(
        self,
        k: Tensor,
        v: Tensor,
        *,
        format: Format,
        grid: Grid = "minmax",
        clip: float | None = 1.0,
        norm: Norm = "l2",
        feedback: Tensor | None = None,
        hadamard_block: int | None = None,
        balance: Tensor | None = None,
        rotate_v: bool = False,
    ) -> Records:
        """Encode groups; see `occamkv.kernels.reference.encode` for the contract."""
        ...

    def decode(self, pages: Pages) -> tuple[Tensor, Tensor]:
        """Read whole pages back: K and V, float32 `[P, H, 128, D]` in cache space."""
        ...

    def stepper(self, layer: StepLayer) -> Stepper | None:
        """Return what runs whole decode steps of a layer, or None: then `attend` and `encode` are called."""
        ...
