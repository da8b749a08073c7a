"""Where the tokens of one sequence are, and how that changes."""

from dataclasses import dataclass, field

from torch import Tensor

from occamkv.formats.records import Records


@dataclass
class Row:
    """Counters of one sequence: positions of its pins, tokens packed, tokens in the residual ring, and its pages.

    Tokens that are not pinned form the *stream*: first the packed ones, then the residual. The oldest `staged` tokens
    of the residual were judged and found fit to be packed (methods that find pins). The first `dropped` packed tokens
    have left the window; the pages hold those behind them.
    """

    pins: list[int] = field(default_factory=list)
    packed: int = 0
    residual: int = 0
    staged: int = 0
    dropped: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def pinned(self) -> int:
        """How many tokens are pinned."""
        return len(self.pins)

    @property
    def tokens(self) -> int:
        """Real tokens taken in."""
        return self.pinned + self.packed + self.residual

    @property
    def held(self) -> int:
        """Packed tokens that are still there."""
        return self.packed - self.dropped

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What decides where the next token goes."""
        return self.pinned, self.packed, self.residual, self.dropped


@dataclass(frozen=True)
class Change:
    """An append that was worked out but not yet written: nothing of it can fail any more."""

    rows: range
    pins: list[int]
    pin_k: Tensor
    pin_v: Tensor
    records: Records | None
    rest_k: Tensor
    rest_v: Tensor
    rest_replaces: bool
    residual: int
    staged: int
