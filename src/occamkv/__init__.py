"""occamkv: the KV cache of a transformer in about 2 to 3 bits per value, attended to on its packed bytes.

`import occamkv` loads no torch; each name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from occamkv.cache import CacheReport, Plan
    from occamkv.formats import Format
    from occamkv.integrations.transformers import PackedCache, Verify, attach, fold, fold_balance
    from occamkv.methods import METHOD_NAMES, Method, method

__version__ = "0.1.0.dev0"

_HOMES = {
    "CacheReport": "occamkv.cache",
    "Format": "occamkv.formats",
    "METHOD_NAMES": "occamkv.methods",
    "Method": "occamkv.methods",
    "PackedCache": "occamkv.integrations.transformers",
    "Plan": "occamkv.cache",
    "Verify": "occamkv.integrations.transformers",
    "attach": "occamkv.integrations.transformers",
    "fold": "occamkv.integrations.transformers",
    "fold_balance": "occamkv.integrations.transformers",
    "method": "occamkv.methods",
}

__all__ = [
    "METHOD_NAMES",
    "CacheReport",
    "Format",
    "Method",
    "PackedCache",
    "Plan",
    "Verify",
    "__version__",
    "attach",
    "fold",
    "fold_balance",
    "method",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'occamkv' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
