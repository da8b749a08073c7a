"""The registry of methods: one line per file. Files are imported when asked for."""

from functools import cache
from importlib import import_module

from occamkv.methods.method import Method

METHOD_NAMES = ("oscar", "kivi", "quarot", "rtn", "full")
"""Names of all methods, in the order of tables."""

DEFAULT_METHOD = "oscar"
"""The method that is taken where none is named."""


@cache
def default_method(name: str) -> Method:
    """Return the method with its published settings. `name` is one of `METHOD_NAMES`."""
    method: Method = import_module(f"occamkv.methods.{name}").METHOD
    return method
