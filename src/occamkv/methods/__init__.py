"""Who fills the formats: one file per paper, one registry line each."""

from typing import Any

from occamkv.methods.method import Encoded, Method
from occamkv.methods.names import parse_name
from occamkv.methods.registry import DEFAULT_METHOD, METHOD_NAMES, method_names

__all__ = ["DEFAULT_METHOD", "METHOD_NAMES", "Encoded", "Method", "method", "method_names"]


def method(name: str, **overrides: Any) -> Method:
    """Return a method by name, with overrides: `method("oscar", k_bits=3, k_group=128)`.

    Args:
        name: A name such as `oscar` or `oscar_k3v2_g128` (see `occamkv methods`).
        **overrides: Fields of `Method` or `Format`.

    Raises:
        UnsupportedFormat: The name is unknown (the nearest is named), or a value is not allowed.
    """
    return parse_name(name, **overrides)
