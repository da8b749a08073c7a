"""The registry of methods: one line per file, and the entry points of other packages. Imported when asked for."""

import re
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from occamkv.errors import UnsupportedFormat
from occamkv.methods.method import Method

METHOD_NAMES = (
    "occam",
    "occam_small",
    "occam_quality",
    "auto",
    "oscar",
    "kivi",
    "ott",
    "quarot",
    "rotatekv",
    "turboquant",
    "kvarn",
    "rtn",
    "full",
)
"""Names of our methods, in the order of tables."""

ENTRY_POINTS = "occamkv.methods"
"""Entry point group in which other packages name a `Method`: `my_method = "my_package.my_method:METHOD"`."""

DEFAULT_METHOD = "occam"
"""The method that is taken where none is named."""

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def method_names() -> tuple[str, ...]:
    """Return the names of all methods: ours in the order of tables, then those of other packages."""
    return (*METHOD_NAMES, *sorted(_foreign()))


@cache
def default_method(name: str) -> Method:
    """Return the method with its published settings. `name` is one of `method_names()`.

    Raises:
        UnsupportedFormat: Another package names something that is no method.
    """
    if name in METHOD_NAMES:
        method: Method = import_module(f"occamkv.methods.{name}").METHOD
        return method
    entry = _foreign()[name]
    try:
        found = entry.load()
    except Exception as error:  # importing somebody's module can raise anything
        raise UnsupportedFormat(f"method {name!r} ({entry.value}) cannot be loaded: {error}.") from error
    if not isinstance(found, Method) or found.name != name or not _NAME.fullmatch(name):
        raise UnsupportedFormat(
            f"entry point {name!r} of group {ENTRY_POINTS!r} ({entry.value}) is {type(found).__name__} "
            f"{getattr(found, 'name', '')!r}; allowed: a Method whose name, in lower case, is that of the entry point."
        )
    return found


@cache
def _foreign() -> dict[str, EntryPoint]:
    """Return what other packages name; a name that could be read as one of ours with parts is left out."""
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    ours = tuple(f"{name}_" for name in METHOD_NAMES)
    return {name: entry for name, entry in found.items() if not f"{name}_".startswith(ours)}
