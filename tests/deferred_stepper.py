"""Whole steps as a GPU runs them, made of a backend's own `attend` and `encode`: it counts by itself, and packs late.

A step first packs what the one before left over, by counts of its own (`flush_tokens`). While a graph is recorded it
does nothing. `Graphs` stands for CUDA's: a replay is the recorded Python call again, with nothing counted on the host.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from occamkv import kernels, ops
from occamkv.formats.records import to_groups, write
from occamkv.integrations.transformers import replay
from occamkv.kernels import FullTokens, PackedTokens, StepLayer
from occamkv.kernels.contract import positions_of


class DeferredStepper:
    """See `occamkv.kernels.Stepper`."""

    def __init__(self, layer: StepLayer, backend: Any, graphs: Graphs) -> None:
        self.layer, self.backend, self.graphs = layer, backend, graphs
        self.residual = (c_int64 * len(layer.tables))(*layer.residual)
        self.packed, self.held = list(layer.packed), list(layer.residual)  # what a GPU would count
        self.flushes = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, due: Sequence[int], **options: Any) -> Tensor:
        if self.graphs.recording:
            assert not any(due)
            return torch.zeros_like(q)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return self._run(q, k, v, due, **options)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, due: Sequence[int], **options: Any) -> Tensor:
        self.settle()
        layer, slots = self.layer, self.layer.ring[0].shape[2]
        at = torch.tensor([n + m for n, m in zip(self.packed, self.held, strict=True)])
        positions = (at + torch.tensor(layer.first_position))[:, None]
        if layer.skips is not None:
            positions = positions_of(positions, layer.skips)
        if layer.key_bias is not None:
            k = k.float() - layer.key_bias.rows(positions)
        k = ops.rotate(k, hadamard_block=layer.hadamard_block, balance=layer.balance)
        for ring, x in zip(layer.ring, (k, ops.hadamard(v) if layer.rotate_v else v), strict=True):
            for row, slot in enumerate((at % slots).tolist()):
                ring[row, :, slot] = x[row, :, 0].to(ring.dtype)
        self.held = [n + 1 for n in self.held]
        out = self.backend.attend(
            q,
            q_positions=positions,
            packed=self._packed(),
            full=[layer.pins, self._waiting(slots)],
            hadamard_block=layer.hadamard_block,
            balance=layer.balance,
            rotate_output=layer.rotate_v,
            key_bias=layer.key_bias,
            **options,
        )
        for row, count in enumerate(due):
            self._pack(row, count)
        self.residual[:] = self.held
        return out

    def settle(self) -> None:
        for row, held in enumerate(self.held):
            if held >= 128 and self.layer.flush_tokens:
                self._pack(row, self.layer.flush_tokens)
                self.flushes += 1

    def _packed(self) -> PackedTokens | None:
        layer = self.layer
        if not any(self.packed):
            return None
        width = max(map(len, layer.tables))
        table = torch.tensor([[*row, *[layer.starts[0]] * (width - len(row))] for row in layer.tables])
        first = torch.tensor(layer.first_position)
        return PackedTokens(layer.slabs, layer.starts, table, torch.tensor(self.packed), first, layer.skips)

    def _waiting(self, slots: int) -> FullTokens:
        layer = self.layer
        packed, held, first = (torch.tensor(x)[:, None] for x in (self.packed, self.held, layer.first_position))
        behind = (torch.arange(slots) - packed) % slots
        numbers = behind + packed + first
        positions = numbers if layer.skips is None else positions_of(numbers, layer.skips)
        return FullTokens(*layer.ring, positions.masked_fill(behind >= held, -1))

    def _pack(self, row: int, count: int) -> None:
        if not count:
            return
        layer, done, form = self.layer, self.packed[row], self.layer.format
        slots = torch.arange(done, done + count) % layer.ring[0].shape[2]
        k, v = (to_groups(x[row : row + 1, :, slots], form.record_tokens) for x in layer.ring)
        made = self.backend.encode(k, v, format=form, grid=layer.grid, clip=layer.clip, feedback=layer.feedback)
        for index in range(len(made.data)):
            page, slot = divmod(done // form.record_tokens + index, form.page_records)
            number = layer.tables[row][page]
            slab = bisect_right(layer.starts, number) - 1
            here = torch.tensor([number - layer.starts[slab]])
            write(layer.slabs[slab], made.select(torch.tensor([index])), page=here, slot=torch.tensor([slot]))
        self.packed[row], self.held[row] = done + count, self.held[row] - count


class Graphs:
    """Stands for CUDA graphs. `recording`: a step is being recorded; `steppers`: all that were made."""

    def __init__(self) -> None:
        self.recording, self.replays = False, 0
        self.steppers: list[DeferredStepper] = []

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recording = True
        try:
            out = step()
        finally:
            self.recording = False

        def again() -> None:
            self.replays += 1
            out.copy_(step())

        return again, out


@contextmanager
def stepping(name: str) -> Iterator[Graphs]:
    """Give a backend steps as on a GPU, and graphs; tensors on the CPU count as a device's."""
    graphs, backend = Graphs(), kernels.backend(name)

    def stepper(layer: StepLayer) -> DeferredStepper:
        graphs.steppers.append(DeferredStepper(layer, backend, graphs))
        return graphs.steppers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "stepper", stepper)
        patch.setattr(replay, "record", graphs.record)
        patch.setattr(replay, "refuses_device", lambda device: None)
        for user in ("layer", "stepping", "waiting"):
            patch.setattr(f"occamkv.cache.{user}.on_host", lambda x: False)
        yield graphs
