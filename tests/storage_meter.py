"""Counts the bytes of torch storages that code makes and holds.

A dispatch mode, because it sees every tensor that a torch operator returns on any device and needs no allocator hooks:
the same meter serves CPU and GPU, and neither Python's allocator nor the resident set of the process (which includes
what a C library keeps for later) blurs the numbers. It does not see scratch space inside one operator or one kernel.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageMeter(TorchDispatchMode):
    """`live`: bytes of storages made inside and not yet freed; `peak`: its maximum; `made`: the sum of all."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.made = 0
        self._tensors_of: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        foreign = {_key(tensor) for tensor in _tensors((args, kwargs))} - self._tensors_of.keys()
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            if (key := _key(tensor)) not in foreign:  # a view of what was there before takes nothing
                self._watch(tensor, key)
        return out

    def _watch(self, tensor: torch.Tensor, key: int) -> None:
        nbytes = tensor.untyped_storage().nbytes()
        if key not in self._tensors_of:
            self.live += nbytes
            self.made += nbytes
            self.peak = max(self.peak, self.live)
        self._tensors_of[key] = self._tensors_of.get(key, 0) + 1
        weakref.finalize(tensor, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._tensors_of[key] -= 1
        if not self._tensors_of[key]:
            del self._tensors_of[key]
            self.live -= nbytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
