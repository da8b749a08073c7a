"""What there is on GPUs for one new token over K and V in bfloat16: torch's kernels, and FlashInfer where installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from occamkv.bench.gpu_timing import REFUSALS, Rig, first_line
from occamkv.bench.stock import folded, gqa

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q `[B, Hq, 1, D]` and K and V `[B, H, T, D]`, all bfloat16, to `[B, Hq, 1, D]`."""

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_FORMULATIONS = {"gqa": gqa, "folded": folded}
_FLASHINFER = {"flashinfer_bf16": torch.bfloat16, "flashinfer_fp8": torch.float8_e4m3fn}
_FLASHINFER_PAGE = 16
_FLASHINFER_WORKSPACE = 128 * 2**20


def sdpa(backend: SDPBackend, formulation: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call SDPA with one kernel and no other: heads grouped by `enable_gqa`, or folded into rows of queries."""
    with sdpa_kernel([backend]):
        return _FORMULATIONS[formulation](q, k, v, None)


def makers(rig: Rig, *, group: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Callable[[], object]]]:
    """Return what makes each contestant's call from q, k and v; making it or calling it may raise `REFUSALS`.

    Args:
        rig: Where; on a CPU torch has one kernel.
        group: Query heads of a KV head; with one there is nothing to fold.
    """
    kernels = KERNELS if rig.device.type == "cuda" else {"math": SDPBackend.MATH}
    forms = _FORMULATIONS if group > 1 else ("gqa",)
    found: dict[str, Any] = {
        f"{name}_{form}": partial(partial, sdpa, kernel, form) for name, kernel in kernels.items() for form in forms
    }
    return found | {name: partial(_flashinfer, dtype) for name, dtype in _FLASHINFER.items()}


def missing(name: str) -> str | None:
    """Return why a contestant cannot be asked at all, or None."""
    return "flashinfer is not installed" if name in _FLASHINFER and find_spec("flashinfer") is None else None


def refusal(call: Callable[[], object]) -> str | None:
    """Call once, before anything is captured; return why that fails, in one line, or None."""
    try:
        with torch.no_grad():
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except REFUSALS as error:
        return first_line(error)
    return None


def _flashinfer(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """FlashInfer's batch decoding over pages of 16 tokens. Never run here: its interface is that of its documents."""
    batch, kv_heads, tokens, head_dim = k.shape
    pages = tokens // _FLASHINFER_PAGE
    paged = [x.unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1).contiguous().to(dtype) for x in (k, v)]
    numbers: dict[str, Any] = {"dtype": torch.int32, "device": q.device}
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, **numbers) * pages,
        torch.arange(batch * pages, **numbers),
        torch.full((batch,), _FLASHINFER_PAGE, **numbers),
        q.shape[1],
        kv_heads,
        head_dim,
        _FLASHINFER_PAGE,
        q_data_type=q.dtype,
        kv_data_type=dtype,
    )
    return partial(wrapper.run, q[:, :, 0].contiguous(), tuple(paged))
