"""Sizes and lengths as people write them: 24GiB, 24GB, 24g, 128k."""

from __future__ import annotations

import re

from occamkv.errors import UnsupportedInput

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]i?b?|b)", re.IGNORECASE)
_TOKENS = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[km]?)", re.IGNORECASE)
_POWERS = "kmgt"
_MOST_TOKENS = 2**30


def bytes_of(text: str, *, name: str) -> int:
    """Return the bytes that a size such as 24GiB means: GiB and g are 2**30 bytes, GB is 10**9.

    Raises:
        UnsupportedInput: It cannot be read; `name` says what it is in the message.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UnsupportedInput(
            f"{name} is {text!r}; allowed: a number with a unit, for example 24GiB or 24g (2**30 bytes), 24GB (10**9)."
        )
    unit = found["unit"].lower()
    if unit == "b":
        return int(float(found["number"]))
    decimal = unit.endswith("b") and "i" not in unit
    base: int = 1000 if decimal else 1024
    factor: int = base ** (_POWERS.index(unit[0]) + 1)
    return int(float(found["number"]) * factor)


def tokens_of(text: str, *, name: str) -> int:
    """Return the tokens that a length such as 128k means: k is 1024, m is 1024 * 1024.

    Raises:
        UnsupportedInput: It cannot be read; `name` says what it is in the message.
    """
    found = _TOKENS.fullmatch(text.strip())
    factor = 1 if found is None else {"": 1, "k": 2**10, "m": 2**20}[found["unit"].lower()]
    tokens = 0.0 if found is None else float(found["number"]) * factor
    if not 1 <= tokens <= _MOST_TOKENS or tokens != int(tokens):
        raise UnsupportedInput(
            f"{name} is {text!r}; allowed: a whole number of tokens up to {tokens_text(_MOST_TOKENS)}, "
            "for example 131072 or 128k (k is 1024)."
        )
    return int(tokens)


def size_text(nbytes: float) -> str:
    """Return bytes as people read them, base 2."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if abs(nbytes) >= 2**power:
            return f"{nbytes / 2**power:.2f} {unit}"
    return f"{nbytes / 2**10:.1f} KiB"


def tokens_text(tokens: int) -> str:
    """Return a length as people read it: 128k where it is a multiple of 1024."""
    for power, unit in ((20, "M"), (10, "k")):
        if tokens >= 2**power and tokens % 2**power == 0:
            return f"{tokens >> power}{unit}"
    return str(tokens)
