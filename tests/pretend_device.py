"""A device that is none: its tensors lie on the CPU, but meet no tensor of the CPU, as on a GPU.

What code makes on the wrong device shows here without a GPU. Its name is that of a device that torch knows and this
build of torch does not bring; nothing of it is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "lazy"
DEVICE = torch.device(NAME)
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
aten = torch.ops.aten


class Away(Tensor):
    """A tensor on the device; `inner` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Away":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:
        return f"Away({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers; refuse tensors of two devices, but for copies and scalars."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [x for x in given if isinstance(x, Away)]
    wanted = kwargs.get("device")
    there = torch.device(wanted).type == NAME if wanted is not None else bool(away)
    indexing = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
    home = [x for x in given if not isinstance(x, Away) and x.dim() > 0]
    if away and home and func not in CROSSING and not indexing:
        raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU, {[tuple(x.shape) for x in home]}")
    if func is aten.copy_.default:
        to, source = (x.inner if isinstance(x, Away) else x for x in args[:2])
        to.copy_(source)
        return args[0]
    if func is aten._local_scalar_dense.default:
        return args[0].inner.item()
    bare_args, bare = pytree.tree_map_only(Away, lambda x: x.inner, (args, kwargs))
    if wanted is not None:
        bare["device"] = torch.device("cpu")
    out = func(*bare_args, **bare)
    in_place = func._schema.is_mutable and isinstance(out, Tensor) and isinstance(args[0], Away)
    if in_place:
        return args[0]
    return pytree.tree_map_only(Tensor, Away, out) if there else out


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = any(isinstance(x, Away) for x in pytree.tree_leaves((args, kwargs)))
        wanted = kwargs.get("device")
        if known or (wanted is not None and torch.device(wanted).type == NAME):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class _Literals(TorchFunctionMode):
    """`torch.tensor` and lists as indices fill tensors where no dispatch mode sees it; so that is done on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], tuple | list):
            given = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in given), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def present() -> Iterator[None]:
    """Let the device be there."""
    with _Factories(), _Literals():
        yield
