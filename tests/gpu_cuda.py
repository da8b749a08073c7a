"""The CUDA backend on a real GPU, behind tests whose tensors lie on the CPU and whose records are canonical."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

import emulated_cuda
from occamkv.formats.records import Records
from occamkv.kernels import PackedTokens, cuda
from occamkv.kernels.cuda import layout

GPU = "gpu_cuda"
"""Name of the target."""


def moved(x: Any, device: torch.device) -> Any:
    """The same with all tensors on a device, however deep they lie in dataclasses, lists, tuples and dicts."""
    if isinstance(x, Tensor):
        return x.to(device)
    if is_dataclass(x) and not isinstance(x, type):
        made = {f.name: moved(getattr(x, f.name), device) for f in fields(x) if f.init}
        return replace(x, **made)
    if isinstance(x, Mapping):
        return {key: moved(value, device) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(moved(value, device) for value in x))
    return type(x)(moved(value, device) for value in x) if isinstance(x, list | tuple) else x


class OnGpu:
    """A backend for tests: arguments go to the GPU, results come back."""

    name = "cuda"

    def __init__(self, device: str = "cuda") -> None:
        self.device = torch.device(device)

    def attend(self, q: Tensor, *, packed: PackedTokens | None, **given: Any) -> Tensor:
        """See `occamkv.kernels.blockwise.attend`. Records are canonical here."""
        native = None if packed is None else emulated_cuda.native(packed)
        q, native, given = moved((q, native, given), self.device)
        return cuda.attend(q, packed=native, **given).cpu()

    def encode(self, k: Tensor, v: Tensor, **given: Any) -> Records:
        """See `occamkv.kernels.reference.encode`. Records come back canonical."""
        k, v, given = moved((k, v, given), self.device)
        made = moved(cuda.encode(k, v, **given), torch.device("cpu"))
        return made._replace(data=layout.to_canonical(made.data, format=given["format"], head_dim=k.shape[-1]))


def missing() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    return None if torch.cuda.is_available() else "torch finds no NVIDIA GPU here"
