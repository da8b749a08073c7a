"""Whole decode steps: what does not change from step to step is described once, the rest is one native call."""

from collections.abc import Sequence
from ctypes import addressof, c_int64, pointer

import torch
from torch import Tensor

from occamkv import ops
from occamkv.kernels.checks import check_key_bias, check_of_heads
from occamkv.kernels.contract import StepLayer
from occamkv.kernels.cpu import library
from occamkv.kernels.cpu.encoding import encode_struct
from occamkv.kernels.cpu.key_bias import turns_of
from occamkv.kernels.cpu.layouts import EVERYTHING, full_struct, slab_structs
from occamkv.kernels.cpu.structs import layout_of, readable, view_of


class LayerStep:
    """Steps of one layer. It holds addresses of the layer's memory: whoever moves that memory makes a new one."""

    def __init__(self, layer: StepLayer) -> None:
        batch, kv_heads, slots, head_dim = layer.ring[0].shape
        self._keep: list[object] = [layer]
        self._described: tuple[object, ...] = ()
        form = layout_of(layer.format, kv_heads=kv_heads, head_dim=head_dim)
        width = max(1, *(len(row) for row in layer.tables))
        numbers = [number for row in layer.tables for number in [*row, *[0] * (width - len(row))]]
        array = slab_structs(layer.slabs, layer.starts, form.record_bytes)
        pins = full_struct(layer.pins, batch, self._keep)
        if layer.key_bias is not None:
            check_key_bias(layer.key_bias, layer.ring[0], kv_heads)
        self._turns, self._leaning, self._positions = turns_of(layer.key_bias), layer.pins.logit_bias, _positions(layer)
        balance, feedback = (
            None if x is None else x.to(torch.float32).contiguous() for x in (layer.balance, layer.feedback)
        )
        packed, table, first = (
            torch.tensor(counts, dtype=torch.int64) for counts in (layer.packed, numbers, layer.first_position)
        )
        self.residual = (c_int64 * batch)(*layer.residual)
        self._nothing_due = torch.zeros(batch, dtype=torch.int64)
        encode = encode_struct(layer.format, kv_heads=kv_heads, head_dim=head_dim, grid=layer.grid, clip=layer.clip)
        encode.feedback = None if feedback is None else feedback.data_ptr()
        self._keep += [array, balance, feedback, packed, table, first]
        self._call = library.Step(
            attend=library.Attend(
                batch=batch,
                kv_heads=kv_heads,
                queries=1,
                head_dim=head_dim,
                balance=None if balance is None else balance.data_ptr(),
                hadamard_block=layer.hadamard_block or 0,
                output_hadamard_block=ops.hadamard_block(head_dim) if layer.rotate_v else 0,
            ),
            packed=library.Packed(
                layout=form,
                slab_count=len(array),
                slabs=array,
                table=table.data_ptr(),
                table_width=width,
                table_stride=width,
                first_position=first.data_ptr(),
                skips=None if layer.skips is None else layer.skips.data_ptr(),
                skip_count=0 if layer.skips is None else layer.skips.shape[1],
            ),
            ring_k=view_of(layer.ring[0]),
            ring_v=view_of(layer.ring[1]),
            pin_k=pins.k,
            pin_v=pins.v,
            ring_slots=slots,
            pin_slots=pins.tokens,
            pin_positions=pins.positions,
            pin_logit_bias=pins.logit_bias,
            packed_tokens=packed.data_ptr(),
            residual=addressof(self.residual),
            encode=encode,
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        due: Sequence[int],
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Take one token of every sequence; see `Stepper`."""
        call, attend = self._call, self._call.attend
        batch, query_heads, _, head_dim = q.shape
        given, k, v = readable(q), readable(k), readable(v)
        out = torch.empty((batch, 1, query_heads, head_dim), dtype=given.dtype).transpose(1, 2)
        sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
        wanted = torch.tensor(due, dtype=torch.int64) if any(due) else self._nothing_due
        described = (query_heads, given.dtype, given.stride(), k.stride(), v.stride())
        if described != self._described:
            if self._leaning is not None:
                check_of_heads("logit_bias", self._leaning, q)
            attend.q, attend.out, call.k, call.v = view_of(given), view_of(out), view_of(k), view_of(v)
            self._described, attend.query_heads = described, query_heads
        else:
            attend.q.data, attend.out.data = given.data_ptr(), out.data_ptr()
            call.k.data, call.v.data = k.data_ptr(), v.data_ptr()
        attend.scale = head_dim**-0.5 if scale is None else scale
        attend.softcap = softcap or 0.0
        attend.window = EVERYTHING if window is None else min(window, EVERYTHING)
        attend.sinks = None if sinks is None else sinks.data_ptr()
        attend.threads = torch.get_num_threads()
        call.due = wanted.data_ptr()
        if self._turns is not None:
            attend.key_bias = pointer(self._turns.up_to(self._positions + 1))
        library.run(call)
        self._positions += 1
        return out.to(q.dtype)

    def settle(self) -> None:
        """Do nothing: every step has settled; see `Stepper`."""


def _positions(layer: StepLayer) -> int:
    """Return a number above the positions of all tokens held."""
    pinned = 0 if layer.skips is None else layer.skips.shape[1]
    counts = zip(layer.first_position, layer.packed, layer.residual, strict=True)
    pins = int(layer.pins.positions.max()) + 1 if layer.pins.positions.numel() else 0
    return max([pins, *(pinned + sum(row) for row in counts)])


def stepper(layer: StepLayer) -> LayerStep:
    """Return what runs whole decode steps of a layer."""
    return LayerStep(layer)
