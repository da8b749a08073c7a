"""Which tokens are pinned because of what they are, and when the others are packed.

Pinned tokens leave the stream of tokens, so records hold none of them; only their positions remember that they were
there. Judging and packing depend on counts alone, never on how a text was cut into calls.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from occamkv.formats import PAGE_TOKENS
from occamkv.kernels import FullTokens
from occamkv.methods import Method
from occamkv.methods.pinning import Pinning
from occamkv.ops.outliers import lowest, outliers

PIN_SLOTS = 8
"""Room for found pins grows by so many tokens."""

_FREE_PINS = 4
_BEHIND = 2**62
_MOST_PINS = 0.02  # of the tokens judged so far, beside the free ones


class Routing(NamedTuple):
    """What becomes of waiting tokens: `found` are pinned (numbers among the waiting, ascending), `due` are packed.

    `due` counts what is left when the pinned ones are out; `judged` of the tokens behind the due ones have been judged.
    """

    found: list[int]
    due: int
    judged: int


def route(method: Method, k: Tensor, v: Tensor, *, judged: int, pinned: int, before: int) -> Routing:
    """Judge waiting tokens, a record's worth whenever 128 are not yet judged, and pack the fit ones by full records.

    When tokens are judged depends on their number alone, so every layer does it in the same step.

    Args:
        method: One that finds pins.
        k: `[H, n, D]`: the waiting tokens, oldest first, in cache space.
        v: The same shape.
        judged: How many of them, from the oldest on, were judged before.
        pinned: How many tokens were pinned by judging so far.
        before: How many tokens before these were packed or pinned by judging.
    """
    waiting = k.shape[1]
    step = method.flush_tokens
    if method.pinning.lowest:
        found = lowest(k[:, :PAGE_TOKENS], method.pinning.lowest) if not pinned and waiting >= PAGE_TOKENS else []
        left = waiting - len(found)
        return Routing(found, ((left - PAGE_TOKENS) // step + 1) * step if left >= PAGE_TOKENS else 0, 0)
    at, staged, due, found = judged, judged, 0, list[int]()
    blocks = (waiting - judged - PAGE_TOKENS) // step + 1
    span = slice(judged, judged + blocks * step)
    factors = outliers(k[:, span], v[:, span]).tolist()
    for first in range(0, len(factors), step):
        here = factors[first : first + step]
        allowed = int(_FREE_PINS + _MOST_PINS * (before + at + step)) - pinned - len(found)
        worst = sorted((-factor, i) for i, factor in enumerate(here) if factor)[: max(0, allowed)]
        found += sorted(at + i for _, i in worst)
        at, staged = at + step, staged + step - len(worst)
        if staged >= step:
            due, staged = due + step, staged - step
    return Routing(found, due, staged)


def split(x: Tensor, taken: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Part tokens `[B, H, T, D]` into those with the numbers `taken`, ascending, and the others."""
    if not taken or taken[-1] == len(taken) - 1:
        return x[:, :, : len(taken)], x[:, :, len(taken) :]
    rest = sorted(set(range(x.shape[2])).difference(taken))
    return x[:, :, list(taken)], x[:, :, rest]


def most_slots(method: Method, tokens: int) -> int:
    """Return for how many pinned tokens a sequence of `tokens` tokens has room at most."""
    sure = method.pin_slots
    if not method.pinning.judges or not method.packed_tokens(tokens):
        return sure
    return sure + int(_FREE_PINS + _MOST_PINS * tokens) + PIN_SLOTS - 1


def skips(pins: Sequence[int]) -> list[int]:
    """Return, for each pin of a sequence (positions, ascending), the number of the stream token that follows it.

    The position of a stream token is its number plus the count of skips that are not above that number.
    """
    return [position - index for index, position in enumerate(pins)]


def position(number: int, pins: Sequence[int]) -> int:
    """Return the position of one stream token."""
    return number + bisect_right(skips(pins), number)


def skip_table(pins: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the skips of all sequences, int64 `[B, P]`, short rows filled with a number above every token's."""
    longest = max((len(row) for row in pins), default=0)
    rows = [skips(row) + [_BEHIND] * (longest - len(row)) for row in pins]
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(pins), longest)


def count(x: Tensor) -> Tensor:
    """Return the positions 0, 1, ... of tokens `[1, H, n, D]`, int64 `[1, n]`."""
    return torch.arange(x.shape[2], device=x.device)[None]


def standing(pins: Sequence[int], first: int) -> list[int]:
    """Return where the pins of a sequence stand when all its other tokens from position `first` on are kept.

    Those that lie further back move up and stand, in order, just before that token.
    """
    passed = sum(position < first for position in pins)
    return [max(position, first - passed + index) for index, position in enumerate(pins)]


def moved_mask(mask: Tensor, old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> Tensor:
    """Return a mask `[B or 1, 1 or Hq, Tq, N]` with the columns of positions `old` of each sequence at `new`."""
    moved = mask.repeat(len(old) // mask.shape[0], 1, 1, 1)
    for own, before, after in zip(moved, old, new, strict=True):
        own[:, :, list(after)] = own[:, :, list(before)]
    return moved


def step_tokens(k: Tensor, v: Tensor, at: Tensor, pinning: Pinning, *, bias: Tensor | None) -> list[FullTokens]:
    """Describe the tokens of a step to a backend: K and V `[B, H, T, D]` at positions `at`, int64 `[B, T]`.

    With a logit bias those that will be pinned because of their place are a part of their own.
    """
    if bias is None:
        return [FullTokens(k, v, at)]
    pinned = torch.isin(at, torch.tensor(pinning.positions, dtype=at.dtype, device=at.device))
    if not bool(pinned.any()):
        return [FullTokens(k, v, at)]
    return [
        FullTokens(k, v, at.masked_fill(pinned, -1)),
        FullTokens(k, v, at.masked_fill(~pinned, -1), logit_bias=bias),
    ]


def pinned_tokens(k: Tensor, v: Tensor, pins: Sequence[Sequence[int]]) -> FullTokens:
    """Describe pins to a backend: K and V `[B, H, P, D]`, and the positions of each sequence's, in its first slots."""
    width = k.shape[2]
    at = [[*row, *[-1] * (width - len(row))] for row in pins]
    return FullTokens(k, v, torch.tensor(at, dtype=torch.int64, device=k.device).reshape(len(pins), width))
