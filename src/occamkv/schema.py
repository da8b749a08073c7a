"""A small schema for result files: a check that names the first thing that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from occamkv.errors import UnsupportedInput

NUMBER = float
"""In a schema: also takes an int, never a bool."""


def check_version(result: Any, version: int, command: str) -> None:
    """Accept a result of a command with this schema version.

    Raises:
        UnsupportedInput: It has another one, or none.
    """
    given = result.get("schema_version") if isinstance(result, Mapping) else None
    if type(given) is not int or given != version:
        raise UnsupportedInput(
            f"this is no result of {command} that can be read: schema_version is {given!r}; "
            f"this version reads {version}."
        )


def check_fields(value: Any, wanted: Any, at: str, *, command: str) -> None:
    """Compare with a schema: a dict of fields (`?` may be missing or null), a list of one kind, a pair, a type.

    Args:
        value: What was read.
        wanted: The schema. A dict with the one key `*` is an object with any keys, all of one kind.
        at: Where `value` stands, for the message.
        command: What writes such a file, for the message.

    Raises:
        UnsupportedInput: A field is missing or holds something else.
    """
    if isinstance(wanted, dict):
        _expect(at, value, "an object", fits=isinstance(value, Mapping))
        inner = dict.fromkeys(value, wanted["*"]) if set(wanted) == {"*"} else wanted
        _check_object(value, inner, at, command)
    elif isinstance(wanted, list):
        _expect(at, value, "a list", fits=isinstance(value, list))
        for index, item in enumerate(value):
            check_fields(item, wanted[0], f"{at}[{index}]", command=command)
    elif isinstance(wanted, tuple):
        _expect(at, value, "two numbers", fits=isinstance(value, list | tuple) and len(value) == len(wanted))
        for item, kind in zip(value, wanted, strict=True):
            check_fields(item, kind, at, command=command)
    elif wanted is NUMBER:
        _expect(at, value, "a number", fits=isinstance(value, int | float) and not isinstance(value, bool))
    else:
        _expect(at, value, "true or false" if wanted is bool else "a text", fits=isinstance(value, wanted))


def _check_object(value: Mapping[str, Any], wanted: dict[str, Any], at: str, command: str) -> None:
    for key, inner in wanted.items():
        name = key.removesuffix("?")
        if name != key and value.get(name) is None:
            continue
        if name not in value:
            raise UnsupportedInput(f"{at} lacks {name!r}; allowed: a JSON file that `{command} --json` wrote.")
        check_fields(value[name], inner, f"{at}.{name}", command=command)


def _expect(at: str, value: Any, allowed: str, *, fits: bool) -> None:
    if not fits:
        raise UnsupportedInput(f"{at} is {str(value)[:40]!r}; allowed: {allowed}.")
