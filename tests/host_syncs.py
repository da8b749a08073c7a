"""Fails where torch would wait for a GPU or bring numbers from the host to it, found out on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default: "a number is read",
    aten.nonzero.default: "the shape depends on numbers",
    aten.masked_select.default: "the shape depends on numbers",
    aten._unique2.default: "the shape depends on numbers",
    aten.equal.default: "numbers are compared on the host",
    aten.lift_fresh.default: "a tensor is made of numbers of the host",
}
METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class HostSync(AssertionError):
    """A step waits for its device."""


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if func in WAITING or by_mask:
            raise HostSync(f"{func}: {WAITING.get(func, 'the shape depends on numbers')}")
        return func(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            raise HostSync(f"{func.__name__}: numbers go to the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def none_allowed() -> Iterator[None]:
    """Raise `HostSync` at the first operation that waits."""
    with _Dispatch(), _Function():
        yield
