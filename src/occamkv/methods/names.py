"""Method names: `name[_bB][_kXvY][_gK[xV]][_m8|_m16][_block|_roll]`, parts equal to the method's default left out.

`_bB` is a budget of B bits per value, for methods that have one.

Any other override cannot be written into a name; the name then ends in `+` and the override lives in a plan file.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Any

from occamkv.errors import UnsupportedFormat
from occamkv.methods.method import Method
from occamkv.methods.registry import default_method, method_names

_PARTS = re.compile(
    r"(_b(?P<budget>[0-9]+(\.[0-9]+)?))?"
    r"(_k(?P<k_bits>[0-9](\.5)?)v(?P<v_bits>[0-9](\.5)?))?(_g(?P<k_group>[0-9]+)(x(?P<v_group>[0-9]+))?)?"
    r"(_m(?P<metadata_bits>[0-9]+))?(_(?P<flush>block|roll))?"
)
_NAMED_FIELDS = ("k_bits", "v_bits", "k_group", "v_group", "metadata_bits")


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` or `.`, to end a sentence about an unknown word."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def parse_name(text: str, **more: Any) -> Method:
    """Return the method that a name such as `oscar_k3v2_g128` stands for, with more overrides.

    All are checked together: what the name says may need what it cannot say, as 2.5 bits need `levels="lloyd"`.

    Raises:
        UnsupportedFormat: The name is unknown or a part is not allowed.
    """
    names = method_names()
    base = max((name for name in names if f"{text}_".startswith(f"{name}_")), key=len, default=None)
    if base is None:
        known = ", ".join(names)
        raise UnsupportedFormat(f"unknown method {text!r}{nearest(text.split('_')[0], names)} Methods: {known}.")
    found = _PARTS.fullmatch(text[len(base) :])
    if found is None:
        budget = "" if default_method(base).budget is None else "[_bB]"
        raise UnsupportedFormat(
            f"cannot read {text!r}; a name is {base}{budget}[_kXvY][_gK[xV]][_m8|_m16][_block|_roll], "
            f"for example {base}_k3v2_g64."
            + (" A '+' stands for overrides that only a plan file holds." if text.endswith("+") else "")
        )
    if base == "full" and text != "full":
        raise UnsupportedFormat(f"cannot read {text!r}: 'full' keeps K and V as they are and takes no parts.")
    overrides: dict[str, Any] = {field: _number(found[field]) for field in _NAMED_FIELDS if found[field]}
    if found["budget"]:
        overrides["budget"] = float(found["budget"])
    if found["flush"]:
        overrides["flush"] = "rolling" if found["flush"] == "roll" else "block"
    return default_method(base).with_overrides(**(overrides | more))


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


def format_name(method: Method) -> str:
    """Return the name of a method: the inverse of `parse_name` where a name can say it all."""
    if method.name not in method_names():
        return method.name
    default = default_method(method.name)
    if method.format is None or default.format is None:
        return method.name
    new, old = method.format, default.format
    name = method.name
    if method.budget not in (None, default.budget):
        name += f"_b{method.budget}".removesuffix(".0")
    if (new.k_bits, new.v_bits) != (old.k_bits, old.v_bits):
        name += f"_k{new.k_bits}v{new.v_bits}"
    if (new.k_group, new.v_group) != (old.k_group, old.v_group):
        name += f"_g{new.k_group}" + (f"x{new.v_group}" if new.v_group != old.v_group else "")
    if new.metadata_bits != old.metadata_bits:
        name += f"_m{new.metadata_bits}"
    if method.flush != default.flush:
        name += "_roll" if method.flush == "rolling" else "_block"
    return name + ("+" if unnamed_overrides(method) else "")


def unnamed_overrides(method: Method) -> dict[str, Any]:
    """Return the fields that differ from the method's default and that a name cannot say.

    Raises:
        UnsupportedFormat: The method's base name is not in the registry, so nothing could read it back.
    """
    if method.name not in method_names():
        raise UnsupportedFormat(
            f"a plan cannot hold method {method.name!r}, which is not in the registry. "
            f"Override fields of one of these: {', '.join(method_names())}."
        )
    default = default_method(method.name)
    changed = {}
    for field in dataclasses.fields(Method):
        value = getattr(method, field.name)
        named = field.name in ("name", "format", "source", "flush") or (field.name == "budget" and value is not None)
        if not named and value != getattr(default, field.name):
            changed[field.name] = value
    if method.format is not None and default.format is not None:
        for field in dataclasses.fields(method.format):
            value = getattr(method.format, field.name)
            if field.name not in _NAMED_FIELDS and value != getattr(default.format, field.name):
                changed[field.name] = value
    return changed
