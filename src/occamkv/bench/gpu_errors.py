"""Before anything is timed on a GPU: attention against float64 on the same dequantized pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from occamkv import kernels
from occamkv.bench.gpu_timing import Rig
from occamkv.bench.inputs import Shape
from occamkv.bench.scene import Scene, packed_scene
from occamkv.bench.stock import exact, gqa, relative_error
from occamkv.kernels import PackedTokens
from occamkv.methods import Method

LIMIT = 2e-3
SHAPES = ("4/4/64", "8/2/64", "8/1/64", "4/4/128", "8/2/128", "16/2/128", "2/2/256", "4/1/256", "8/1/256")
_CONTEXT, _BATCH = 1500, 3


def check_errors(methods: Sequence[Method], rig: Rig) -> list[dict[str, Any]]:
    """Return a row for each method and small shape, batches being ragged; `ok` tells whether it is exact enough."""
    return [_row(name, method, rig) for method in methods for name in SHAPES]


def _row(name: str, method: Method, rig: Rig) -> dict[str, Any]:
    shape = Shape(name, *map(int, name.split("/")))
    backend = kernels.backend_for(method.packed_format, rig.device, shape.head_dim)
    scene = packed_scene(shape, method, backend, context=_CONTEXT, batch=_BATCH, device=rig.device)
    ours, stock = scene_errors(scene, record_tokens=method.packed_format.record_tokens)
    row = {"shape": name, "method": str(method), "backend": backend.name, "ours": ours, "sdpa_bf16": stock}
    return row | {"limit": LIMIT, "ok": bool(ours <= min(LIMIT, stock))}


@torch.no_grad()
def scene_errors(scene: Scene, *, record_tokens: int) -> tuple[float, float]:
    """Return the largest relative L2 error of a sequence: ours, and that of SDPA in bfloat16.

    The second sequence holds a record less than the first, and so on. Ours gets the query as float32, so that the
    rounding of its output to bfloat16 does not hide its own error. Not a number counts as infinite.
    """
    k, v = scene.dequantized()
    packed = cast(PackedTokens, scene.packed)
    fewer = record_tokens * torch.arange(len(packed.lengths), device=packed.lengths.device)
    ragged = replace(scene, packed=replace(packed, lengths=packed.lengths - fewer))
    found = ragged.attend(scene.q.float())
    pairs = []
    for row, cut in enumerate(fewer.tolist()):
        end = int(packed.first_position[row] + packed.lengths[row])
        held_k, held_v = (torch.cat((x[:, :, : end - cut], x[:, :, end:]), dim=2) for x in (k, v))
        q = scene.q[row : row + 1]
        truth = exact(q, held_k, held_v)
        low = gqa(q, held_k.to(q.dtype), held_v.to(q.dtype), None)
        pairs.append((_error(found[row : row + 1], truth), _error(low, truth)))
    return max(ours for ours, _ in pairs), max(stock for _, stock in pairs)


def _error(found: Tensor, truth: Tensor) -> float:
    error = relative_error(found, truth)
    return error if error == error else float("inf")
