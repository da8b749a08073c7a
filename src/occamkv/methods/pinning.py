"""Which tokens of a sequence a method pins, as its `pins` field says."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from occamkv.errors import UnsupportedFormat

_TEXT = re.compile(
    r"none|detected|first:(?P<first>[0-9]{1,4})(?P<found>\+found)?|lowest:(?P<lowest>[0-9]{1,4})"
    r"|at:(?P<at>[0-9]{1,9}(,[0-9]{1,9})*)"
)
_MOST = 1024
_ALLOWED = (
    "allowed: 'none', 'first:4', 'first:4+found', 'detected', 'lowest:5', 'at:0,7,130' (any numbers), or a list of "
    "positions."
)


@dataclass(frozen=True)
class Pinning:
    """What a `pins` field means.

    `positions`: pinned because of their place, ascending. `judges`: tokens are also judged by their norms before they
    are packed. `lowest`: so many tokens with the lowest K norm among the first that are due are pinned.
    """

    positions: tuple[int, ...] = ()
    judges: bool = False
    lowest: int = 0

    @property
    def leading(self) -> int:
        """How many first tokens are pinned because of their place."""
        return next((i for i, position in enumerate(self.positions) if position != i), len(self.positions))

    @property
    def finds(self) -> bool:
        """Whether tokens may be pinned because of what they are."""
        return self.judges or self.lowest > 0

    @property
    def scatters(self) -> bool:
        """Whether pinned tokens may lie between others."""
        return self.finds or self.leading < len(self.positions)

    def among(self, start: int, stop: int) -> Sequence[int]:
        """Return the positions from `start` to before `stop` that are pinned because of their place."""
        return self.positions[bisect_left(self.positions, start) : bisect_left(self.positions, stop)]

    def before(self, stop: int) -> int:
        """Return how many tokens before `stop` are pinned because of their place."""
        return bisect_left(self.positions, stop)

    def place_of(self, number: int) -> int:
        """Return the position of a token that is not pinned because of its place, from its number among such."""
        place = number
        for pinned in self.positions:
            place += pinned <= place
        return place


def pins_text(pins: str | Sequence[int]) -> str:
    """Return the `pins` field that stands for a list of positions; a text is returned as it is.

    Raises:
        UnsupportedFormat: A position is no whole number.
    """
    if isinstance(pins, str):
        return pins
    places = [p for p in pins if type(p) is int] if isinstance(pins, (list, tuple)) else []
    if not isinstance(pins, (list, tuple)) or len(places) < len(pins):
        raise UnsupportedFormat(f"pins is {pins!r}; {_ALLOWED}")
    return "at:" + ",".join(map(str, sorted(set(places)))) if pins else "none"


@cache
def pinning(pins: str) -> Pinning:
    """Read a `pins` field.

    Raises:
        UnsupportedFormat: It says nothing that is known.
    """
    found = _TEXT.fullmatch(pins)
    if found is None:
        raise UnsupportedFormat(f"pins is {pins!r}; {_ALLOWED}")
    first: int = int(found["first"] or 0)
    at: str | None = found["at"]
    positions = tuple(range(first)) if at is None else tuple(sorted(set(map(int, at.split(",")))))
    if at is not None and len(positions) > _MOST:
        raise UnsupportedFormat(f"pins names {len(positions)} positions; allowed: at most {_MOST}.")
    return Pinning(positions, bool(found["found"]) or pins == "detected", int(found["lowest"] or 0))
