"""Memory that ends at a page that nobody may touch: one byte read or written behind it kills the process.

For Linux and macOS; to be used in a process of its own.
"""

import ctypes
import mmap
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from occamkv.kernels import FullTokens
from scattered_pages import clone_slabs
from some_attention import Case

PAGE = mmap.PAGESIZE
NO_ACCESS = 0
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[Any] = []  # a mapping lives as long as the process


def guarded(x: Tensor | None) -> Tensor | None:
    """Copy a tensor so that its last byte is the last one before the page that nobody may touch."""
    if x is None or x.numel() == 0:
        return x
    pages = -(-x.nbytes // PAGE)
    room = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    if _libc.mprotect(ctypes.c_void_p(address + pages * PAGE), ctypes.c_size_t(PAGE), NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    first = pages * PAGE - x.nbytes
    moved = torch.frombuffer(room, dtype=x.dtype, count=x.numel(), offset=first).view(x.shape)
    _kept.append(room)
    return moved.copy_(x)


def byte_behind(x: Tensor) -> int:
    """Read the byte behind a guarded tensor: this does not return."""
    return ctypes.c_char.from_address(x.data_ptr() + x.nbytes).value[0]


def guarded_case(case: Case) -> Case:
    """The same case with each tensor, and each page of the pool, in guarded memory."""
    full = [FullTokens(*map(guarded, (part.k, part.v, part.positions))) for part in case.full]
    crossing = {name: guarded(x) if isinstance(x, Tensor) else x for name, x in case.crossing.items()}
    moved = replace(case, q=guarded(case.q), q_positions=guarded(case.q_positions), full=full, crossing=crossing)
    if case.packed is None:
        return moved
    slabs, starts = [], []
    for slab, start in zip(clone_slabs(case.packed), case.packed.starts, strict=True):
        for page in range(slab.count):
            names = ("records", "norms", "super_scales")
            parts = {n: None if getattr(slab, n) is None else getattr(slab, n)[page : page + 1] for n in names}
            slabs.append(replace(slab, **{n: guarded(x) for n, x in parts.items()}))
            starts.append(start + page)
    numbers = {n: guarded(getattr(case.packed, n)) for n in ("table", "lengths", "first_position", "skips")}
    return replace(moved, packed=replace(case.packed, slabs=slabs, starts=starts, **numbers))
