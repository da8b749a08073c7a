"""Whole decode steps in two launches per layer: `append` (pack what was due, rotate, take a token), then `attend`.

All state lies on the device: how many tokens are packed and how many wait, where they stand, what their K adds to token
norms. Shapes are fixed and nothing is waited for or copied from the host, so a step can be captured in a CUDA graph. A
replay is the captured launches once more: it reads q, k and v where they were, appends to where the sequences have come
since, and first packs what the last one has made due. `settle` packs the rest and brings the counts back. Whoever keeps
a graph keeps the stepper, whose memory it uses, and has taken a step before the capture: the first one loads kernels.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.kernels.checks import check_lengths
from occamkv.kernels.contract import FullTokens, PackedTokens, StepLayer, positions_of
from occamkv.kernels.cuda import launching
from occamkv.kernels.cuda.attention import splits_for
from occamkv.kernels.cuda.call import Options, check_pages, is_aligned, prepare, readable, slab_table
from occamkv.kernels.cuda.encoding import BEYOND_RANGE, DOES_NOT_FIT, Rules, View, rules_of, takes, view_of
from occamkv.kernels.cuda.kernel import Call, Kernel
from occamkv.kernels.cuda.layout import ORDER
from occamkv.ops import hadamard_block
from occamkv.ops.sums import folded_sum

_REASONS = {
    DOES_NOT_FIT: "K or V does not fit its stored numbers",
    BEYOND_RANGE: "a scale of K or V is larger than the attend kernel's products can hold",
}


class Arguments(ctypes.Structure):
    """`AppendArguments` of native/arguments.h."""

    _fields_ = (
        *((name, View) for name in ("k", "v", "ring_k", "ring_v")),
        *((name, ctypes.c_void_p) for name in ("packed", "residual", "position", "positions", "squares")),
        *((name, ctypes.c_void_p) for name in ("slabs", "table", "counters", "flags")),
        *((name, ctypes.c_int) for name in ("slab_count", "table_width", "kv_heads", "slots", "square_slots")),
        *((name, ctypes.c_int) for name in ("tokens", "flush_tokens")),
        ("rules", Rules),
    )


def stepper(layer: StepLayer) -> "LayerStep | None":
    """Return what runs whole decode steps of a layer; None for what the kernels do not take.

    Raises:
        UnsupportedInput: Counts and pages do not fit together.
    """
    ring, tokens = layer.ring[0], layer.format.record_tokens
    biased = layer.key_bias is not None and len(layer.key_bias.rotary.frequencies) > 0
    if biased or layer.feedback is not None or not takes(layer.format, ring.shape[3]):
        return None
    if ring.shape[2] % tokens or layer.flush_tokens % tokens or not all(_in_place(x) for x in layer.ring):
        return None
    return LayerStep(layer)


class LayerStep:
    """Steps of one layer. It holds addresses of the layer's memory: whoever moves that memory makes a new one.

    `residual` is brought up to date by each step that runs, and by `settle`; a step that is only captured leaves it.
    """

    def __init__(self, layer: StepLayer) -> None:
        _check(layer)
        ring, device = layer.ring[0], layer.ring[0].device
        batch, kv_heads, slots, head_dim = ring.shape
        self._layer = layer
        self._alike: list[object] = []
        self._sinks: Tensor | None = None
        self._captured: list[Call] = []
        self.residual = (ctypes.c_int64 * batch)(*layer.residual)
        self._state, self._positions, squares = _state(layer)
        packed, waiting, self._position = self._state.unbind(0)
        width = max(1, *(len(row) for row in layer.tables))
        rows = [[*row, *[-1] * (width - len(row))] for row in layer.tables]
        table = torch.tensor(rows, dtype=torch.int64, device=device)
        self._packed = None
        if layer.slabs:
            first = torch.tensor(layer.first_position, dtype=torch.int64, device=device)
            self._packed = PackedTokens(layer.slabs, layer.starts, table, packed, first, layer.skips)
        self._full = [layer.pins, FullTokens(*layer.ring, self._positions)]
        self._flags = torch.zeros(1, dtype=torch.int32, device=device)
        self._told = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._raised = ctypes.c_int32.from_address(self._told.data_ptr())
        counters = torch.zeros(batch, dtype=torch.int32, device=device)
        slabs = slab_table(layer.slabs, layer.starts, ring)
        self._keep = keep = [packed, waiting, squares, table, counters, slabs]
        self._arguments = Arguments(
            ring_k=view_of(layer.ring[0], keep),
            ring_v=view_of(layer.ring[1], keep),
            packed=packed.data_ptr(),
            residual=waiting.data_ptr(),
            position=self._position.data_ptr(),
            positions=self._positions.data_ptr(),
            squares=squares.data_ptr(),
            slabs=slabs.data_ptr(),
            table=table.data_ptr(),
            counters=counters.data_ptr(),
            flags=self._flags.data_ptr(),
            slab_count=len(layer.slabs),
            table_width=width,
            kv_heads=kv_heads,
            slots=slots,
            square_slots=squares.shape[1],
            tokens=1,
            flush_tokens=layer.flush_tokens,
            rules=rules_of(
                layer.format,
                head_dim,
                grid=layer.grid,
                clip=layer.clip,
                balance=layer.balance,
                blocks=(layer.hadamard_block, hadamard_block(head_dim) if layer.rotate_v else None),
                keep=keep,
            ),
        )
        kernel, grid = Kernel("append", layer.format, head_dim), (kv_heads, batch, 1)
        self._append = Call(kernel, self._arguments, grid, device, keep)
        only_pack = Arguments.from_buffer_copy(self._arguments)
        only_pack.tokens = 0
        self._pack = self._append._replace(arguments=only_pack)
        self._attend = self._append  # until the first step says what its queries are like

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
        """Take one token of every sequence; see `Stepper`.

        Raises:
            UnsupportedInput: Shapes do not fit together, or an earlier step could not be stored.
        """
        self._refuse(self._raised.value)
        given, k, v = readable(q), readable(k), readable(v)
        options = Options(scale, window, softcap, sinks)
        self._describe(given, k, v, options)
        batch, heads, _, head_dim = given.shape
        out = torch.empty((batch, 1, heads, head_dim), dtype=given.dtype, device=q.device).transpose(1, 2)
        attend, append = self._attend.arguments, self._arguments
        attend.q, attend.out = given.data_ptr(), out.data_ptr()
        append.k.x, append.v.x = k.data_ptr(), v.data_ptr()
        launching.launch(self._append)
        launching.launch(self._attend)
        if launching.capturing(q.device):
            self._captured.append(self._attend)  # its memory is that of every replay
        else:
            self._count(due)
        return out.to(q.dtype)

    def settle(self) -> None:
        """Pack what is due and bring `residual` up to date; waits for the device. See `Stepper`.

        Raises:
            UnsupportedInput: A step could not be stored.
        """
        launching.launch(self._pack)
        self.residual[:] = self._state[1].tolist()
        self._told.copy_(self._flags)
        self._refuse(self._raised.value)

    def _describe(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        """Describe the attend call unless the last step's was like it, but for the places of q, k, v and the result."""
        sinks, layer = options.sinks, self._layer
        alike: list[object] = [options.scale, options.window, options.softcap, q.shape]
        for x in (q, k, v):
            alike += [x.dtype, x.stride(), x.data_ptr() % 16]
        if sinks is not None and not sinks.is_inference():
            alike.append(sinks._version)
        if alike == self._alike and sinks is self._sinks:
            return
        batch, kv_heads, _, head_dim = layer.ring[0].shape
        shape = (batch, kv_heads, 1, head_dim)
        wrong = any(tuple(x.shape) != shape or x.device != layer.ring[0].device for x in (k, v))
        if wrong or q.dim() != 4 or q.shape[2] != 1:
            raise UnsupportedInput(
                f"a step has q {tuple(q.shape)}, K {tuple(k.shape)} and V {tuple(v.shape)}; allowed: one token of each "
                f"sequence, K and V {shape} on {layer.ring[0].device}."
            )
        self._attend, _ = prepare(
            q,
            q_positions=self._position[:, None],
            packed=self._packed,
            full=self._full,
            options=replace(
                options,
                hadamard_block=layer.hadamard_block,
                balance=layer.balance,
                rotate_output=layer.rotate_v,
            ),
            packed_splits=splits_for(q, self._packed, launching.processors(q.device)),
        )
        blocks, heads, rows = self._attend.grid
        counters = torch.zeros(blocks * heads * rows, dtype=torch.int32, device=q.device)
        self._attend.arguments.counters = counters.data_ptr()  # no other call's, on whatever stream a graph runs
        self._attend.keep.append(counters)
        self._arguments.k, self._arguments.v = view_of(k, []), view_of(v, [])
        self._alike, self._sinks = alike, sinks

    def _count(self, due: Sequence[int]) -> None:
        """Pack what this step has made due, without waiting for it, and count."""
        if any(due):
            launching.launch(self._pack)
            self._told.copy_(self._flags, non_blocking=True)
        for row, count in enumerate(due):
            self.residual[row] += 1 - count

    def _refuse(self, flags: int) -> None:
        """Raise unless all steps could be stored."""
        if flags:
            reasons = [reason for flag, reason in _REASONS.items() if flags & flag]
            told = "; ".join(reasons) or "a sequence has taken more tokens than its pages have room for"
            raise UnsupportedInput(
                f"an earlier decode step could not be stored: {told}. Keep this layer in full precision (a plan with "
                "method 'full'), and read the text anew."
            )


def _in_place(x: Tensor) -> bool:
    """Return whether the kernels read a ring where it lies."""
    return readable(x) is x and is_aligned(x)


def _check(layer: StepLayer) -> None:
    slots, tokens = layer.ring[0].shape[2], layer.format.record_tokens
    for slab in layer.slabs:
        slab.check_order(ORDER)
    for row, (pages, packed, held) in enumerate(zip(layer.tables, layer.packed, layer.residual, strict=True)):
        check_lengths([packed], record_tokens=tokens, pages=len(pages))
        check_pages(pages, layer.slabs, layer.starts)
        if not 0 <= held <= slots:
            raise UnsupportedInput(
                f"sequence {row} has {held} tokens in a ring of {slots} slots: they do not fit together."
            )


def _state(layer: StepLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return what changes from step to step, on the device.

    Packed tokens, residual and position of the newest token, int64 `[3, B]`; positions of the ring's slots, int64
    `[B, slots]`; and the sums of squares of the ring's K, float32 `[B, slots + 1, H]`: one more than the ring,
    since a token may come while the one in its slot is being packed.
    """
    k, device = layer.ring[0], layer.ring[0].device
    batch, kv_heads, slots, _ = k.shape
    counts = torch.tensor([layer.packed, layer.residual, layer.first_position], dtype=torch.int64)
    packed, residual, first = counts[:, :, None]
    behind = (torch.arange(slots) - packed) % slots
    numbers = torch.cat((packed + behind, packed + residual), dim=1)
    places = numbers + first
    places = places if layer.skips is None else positions_of(places, layer.skips.cpu())
    positions = places[:, :slots].masked_fill(behind >= residual, -1)
    state = torch.stack((counts[0], counts[1], places[:, slots] - 1)).to(device)
    squares = torch.zeros(batch, slots + 1, kv_heads, device=device)
    if layer.format.token_scale:
        row, slot = (behind < residual).nonzero(as_tuple=True)
        own, row, slot = (x.to(device) for x in (numbers[row, slot] % (slots + 1), row, slot))
        squares[row, own] = folded_sum(k[row, :, slot].to(torch.float32).square(), dim=-1)
    return state, positions.to(device), squares
