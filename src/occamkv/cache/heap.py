"""Give freed memory back to the system.

A long prompt takes and frees tensors of many megabytes in each layer. The C library keeps them on its heap, and small
objects that stay in between pin it there, so the process would remain as large as a full cache had made it.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None where the C library has none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return free heap memory to the system, where the C library can; it costs a few milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)
