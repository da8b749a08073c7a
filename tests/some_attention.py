"""A made-up cache for one call of `attend`: ragged pages, residual rings, pins, new tokens, and their truth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import emulated_cuda
import slow_decoder
from attention_truth import allowed_error, assert_close, attention, hadamard_matrix, relative_error, torch_attention
from gpu_cuda import GPU, OnGpu, missing
from occamkv import kernels
from occamkv.formats.records import Records, encode, to_groups
from occamkv.kernels import FullTokens, PackedTokens
from occamkv.kernels.cpu import library
from occamkv.kernels.cuda import refuses, refuses_format
from occamkv.methods import Method, method
from occamkv.methods.crossing import Statistics
from scattered_pages import scatter

ASKS_AND_FINDS = {
    "occam": method("occam"),
    "occam_quality": method("occam_quality"),
    "turboquant": method("turboquant"),
    "ott": method("ott"),
    "kvarn": method("kvarn"),
    "rotatekv, which finds pins and flushes in blocks": method("rotatekv"),
}
"""Methods that use statistics, random signs, another norm, or pins that are found."""

METHODS = {
    "oscar": method("oscar"),
    "kivi": method("kivi"),
    "quarot": method("quarot"),
    "rtn": method("rtn"),
    "kivi-k3v4-with-8-bit-metadata": method("kivi_k3v4_m8"),
    "lloyd-max-levels-of-2.5-and-3-bits": method("turboquant_k2.5v3", k_rotation="hadamard", v_rotation="hadamard"),
    "oscar-k4v3-balanced-with-float16-norms": method("oscar_k4v3_g64", k_rotation="balanced", norm_dtype="float16"),
}


ON_CPU = tuple(name for name in kernels.BACKENDS if name != "cuda")


def targets() -> tuple[str, ...]:
    """What the contract runs on: every backend of a CPU, its own once for each instruction set of this machine."""
    found = () if library.unavailable() else library.isas()
    return tuple(n for name in ON_CPU for n in ([f"cpu-{i}" for i in found] if name == "cpu" else []) or [name])


TARGETS = targets()
CPU_TARGETS = tuple(name for name in TARGETS if name.startswith("cpu"))
DEFAULT_TARGETS = tuple(name for name in TARGETS if name not in CPU_TARGETS[1:])
"""Without the instruction sets that are not the best one: for tests of what all of them share."""

AVAILABLE = tuple(name for name in ON_CPU if name != "cpu" or not library.unavailable())
"""Backends that can run here: where the C++ library was not built, the CPU's cannot."""

EMULATED = "emulated_cuda"
"""The CUDA kernel, built for the CPU; see tests/cuda/emulator.h."""

backends = pytest.mark.parametrize("backend", TARGETS, indirect=True)
on_gpu = pytest.param(GPU, marks=pytest.mark.gpu)
attend_backends = pytest.mark.parametrize("backend", [*TARGETS, EMULATED, on_gpu], indirect=True)
default_backends = pytest.mark.parametrize("backend", DEFAULT_TARGETS, indirect=True)
cpu_backends = pytest.mark.parametrize("backend", CPU_TARGETS, indirect=True)


def backend_or_skip(name: str, form: Method, head_dim: int | None = None) -> kernels.Backend:
    """A backend, or a skip that gives its own reason."""
    if name == EMULATED:
        reason = emulated_cuda.missing() or refuses_format(form.packed_format)
        return pytest.skip(reason) if reason else emulated_cuda.Emulated()
    if name == GPU:
        reason = missing() or refuses(form.packed_format, torch.device("cuda"))
        return pytest.skip(reason) if reason else OnGpu()
    reason = kernels.backend(name).refuses(form.packed_format, torch.device("cpu"), head_dim)
    return pytest.skip(reason) if reason else kernels.backend(name)


class Held(NamedTuple):
    """One sequence: pinned tokens, packed groups, tokens of the residual; and left pads among the queries."""

    pins: int
    groups: int
    residual: int
    pads: int = 0


RAGGED = (Held(2, 5, 20), Held(2, 0, 3), Held(1, 3, 127))


@dataclass(frozen=True)
class Case:
    """Arguments of `attend`, and the same tokens in model space and float64."""

    q: Tensor
    q_positions: Tensor
    packed: PackedTokens | None
    full: Sequence[FullTokens]
    crossing: dict[str, Any]
    k: Tensor  # [B, H, N, D]
    v: Tensor
    positions: Tensor  # [B, N], -1 for an empty slot

    def attend(self, backend: Any, **options: Any) -> Tensor:
        """What a backend says."""
        given = {"q_positions": self.q_positions, "packed": self.packed, "full": self.full}
        return backend.attend(self.q, **given, **self.crossing, **options)

    def check(self, backend: Any, **options: Any) -> Tensor:
        """Compare what a backend says with the truth; return the truth, `[B, Hq, Tq, D]`."""
        out = self.attend(backend, **options)
        assert out.dtype == self.q.dtype
        where = {"q_positions": self.q_positions, "positions": self.positions, **options}
        truth = attention(self.q.double(), self.k, self.v, **where)
        short = torch_attention(self.q, self.k.to(self.q.dtype), self.v.to(self.q.dtype), **where)
        torch_error = relative_error(short, truth)

        def bfloat16() -> Tensor:
            return torch_attention(*(x.bfloat16() for x in (self.q, self.k, self.v)), **where)

        name = getattr(backend, "name", "")
        allowed = allowed_error(name, out, truth, bfloat16=bfloat16)
        if name == "cuda" and out.dtype == torch.float16:  # half the error of bfloat16, where float16 has less
            torch_error = max(torch_error, relative_error(bfloat16(), truth) / 4)
        assert_close(out, truth, torch_error=torch_error, allowed=allowed)
        blind = (truth == 0).all(-1)
        assert (out[blind] == 0).all(), "a query that sees nothing must give zeros"
        return truth

    @property
    def mask_positions(self) -> int:
        """A number above every position."""
        return max(0, int(self.positions.max()), int(self.q_positions.max())) + 1

    def repeated(self, rows: int) -> "Case":
        """A case of one sequence as one of many equal sequences, read from the same memory: batch strides of 0."""

        def many(x: Tensor) -> Tensor:
            return x.expand(rows, *x.shape[1:])

        full = [FullTokens(*map(many, (part.k, part.v, part.positions))) for part in self.full]
        of_rows = {name: many(getattr(self.packed, name)) for name in ("table", "lengths", "first_position")}
        names = ("q", "q_positions", "k", "v", "positions")
        return replace(self.with_packed(**of_rows), full=full, **{name: many(getattr(self, name)) for name in names})

    def with_packed(self, **changes: Any) -> "Case":
        """The same truth about packed tokens that were tampered with."""
        return replace(self, packed=replace(self.packed, **changes))


class Space(NamedTuple):
    """Model space and cache space by explicit orthonormal matrices, float64; d is what K is multiplied by before."""

    k_matrix: Tensor
    v_matrix: Tensor
    d: Tensor  # [H, 1, D]

    def to_cache(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., H, T, D]` from model space."""
        return (k.double() * self.d) @ self.k_matrix, v.double() @ self.v_matrix

    def to_model(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., H, T, D]` from cache space."""
        return k.double() @ self.k_matrix.T / self.d, v.double() @ self.v_matrix.T


def space_of(form: Method, head_dim: int, balance: Tensor | None) -> Space:
    """The crossing of a method, built from what its fields say."""
    largest = max(2**i for i in range(9) if head_dim % 2**i == 0)
    k_matrix, v_matrix = (
        hadamard_matrix(head_dim, None if rotation == "none" else largest)
        for rotation in (form.k_rotation, form.v_rotation)
    )
    if form.k_rotation == "random":
        k_matrix = torch.diag(fixed_signs(head_dim)) @ k_matrix
    if form.v_rotation == "random":
        v_matrix = torch.diag(fixed_signs(head_dim)) @ v_matrix
    d = torch.ones(1, 1, head_dim).double() if balance is None else balance.double()[:, None]
    return Space(k_matrix, v_matrix, d)


def fixed_signs(head_dim: int) -> Tensor:
    """The signs of a random-sign rotation, float64 `[D]`: the lowest bits of splitmix64 seeded with "occamkv"."""
    signs, mask = [], 2**64 - 1
    for i in range(1, head_dim + 1):
        z = int.from_bytes(b"occamkv", "big") + i * 0x9E3779B97F4A7C15 & mask
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = (z ^ z >> shift) * factor & mask
        signs.append(2.0 * (z & 1) - 1.0)
    return torch.tensor(signs, dtype=torch.float64)


def some_balance(heads: int, head_dim: int, seed: int = 0) -> Tensor:
    """A balance vector d, `[H, D]`."""
    return torch.exp(0.5 * torch.randn(heads, head_dim, generator=torch.Generator().manual_seed(seed)))


def some_statistics(form: Method, heads: int, head_dim: int) -> Statistics | None:
    """Statistics for a method that needs a model's: the balance vector, and a moment of correlated queries."""
    if not form.needs_model:
        return None
    mixing = torch.randn(heads, head_dim, head_dim, generator=torch.Generator().manual_seed(1))
    return Statistics(some_balance(heads, head_dim), mixing @ mixing.transpose(1, 2) / head_dim)


def some_tokens(*shape: int, generator: torch.Generator) -> Tensor:
    """K or V `[..., T, D]` in model space with unequal channels and tokens."""
    channels = torch.exp(0.5 * torch.randn(shape[-1], generator=generator))
    each = torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=generator))
    return torch.randn(*shape, generator=generator) * channels * each + 0.3


def plant_outliers(k: Tensor, v: Tensor, *, share: float, generator: torch.Generator) -> None:
    """Turn about this share of the tokens `[B, H, T, D]` into sinks (short K and V) or loud keys, in place."""
    for row in range(k.shape[0]):
        dice = torch.rand(k.shape[2], generator=generator)
        sinks, loud = dice < share / 2, (dice >= share / 2) & (dice < share)
        k[row][:, sinks] *= 0.25
        v[row][:, sinks] *= 0.1
        k[row][:, loud] *= 4


def make_case(
    form: Method,
    *,
    head_dim: int = 64,
    heads: int = 2,
    gqa: int = 1,
    queries: int = 5,
    held: Sequence[Held] = RAGGED,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Make tokens, pack them, and read the packed ones back with the slow reader."""
    generator = torch.Generator().manual_seed(seed)
    balance = some_balance(heads, head_dim, seed) if form.k_rotation == "balanced" else None
    space = space_of(form, head_dim, balance)

    def fresh(count: int) -> tuple[Tensor, Tensor]:
        k, v = (some_tokens(heads, count, head_dim, generator=generator) for _ in range(2))
        return space.to_cache(k, v)

    size = form.packed_format.record_tokens
    rows = [pack(*fresh(h.groups * size), form) if h.groups else None for h in held]
    packed = scatter(rows, form.packed_format, heads=heads, head_dim=head_dim, seed=seed)
    packed = replace(packed, first_position=torch.tensor([h.pins for h in held]))
    pins = place(fresh, [(h.pins, 0, 0) for h in held], slots=max(h.pins for h in held), dtype=dtype)
    ring = place(fresh, [(h.residual, h.groups * size, h.pins + h.groups * size) for h in held], slots=128, dtype=dtype)
    ends = [h.pins + h.groups * size + h.residual for h in held]
    steps = [(queries - h.pads, h.pads, end) for h, end in zip(held, ends, strict=True)]
    new = place(fresh, steps, slots=queries, dtype=dtype)
    full = [part for part in (pins, ring, new) if part.k.shape[2]]

    parts = [unpacked(rows, held, form, heads, head_dim), *((f.k.double(), f.v.double(), f.positions) for f in full)]
    k, v = space.to_model(*(torch.cat([part[i] for part in parts], dim=2) for i in (0, 1)))
    q = torch.randn(len(held), heads * gqa, queries, head_dim, generator=generator).to(dtype)
    rotates_k, rotates_v = form.hadamard_blocks(head_dim)
    crossing = {"hadamard_block": rotates_k, "balance": balance, "rotate_output": rotates_v is not None}
    positions = torch.cat([part[2] for part in parts], dim=1)
    return Case(q, new.positions, packed if any(rows) else None, full, crossing, k, v, positions)


def pack(k: Tensor, v: Tensor, form: Method) -> Records:
    """Records of one sequence, `[H, T, D]` in cache space."""
    groups = (to_groups(x[None].float(), form.packed_format.record_tokens) for x in (k, v))
    return encode(*groups, format=form.packed_format, grid=form.grid, clip=form.clip, norm=form.norm)


def place(fresh: Any, rows: Sequence[tuple[int, int, int]], *, slots: int, dtype: torch.dtype) -> FullTokens:
    """Full-precision tokens by rows of (count, first slot of the ring, first position); empty slots hold 1000."""
    made = [fresh(count) for count, _, _ in rows]
    k = torch.full((len(rows), made[0][0].shape[0], slots, made[0][0].shape[-1]), 1e3, dtype=dtype)
    v, positions = k.clone(), torch.full((len(rows), slots), -1)
    for row, ((count, slot, position), (new_k, new_v)) in enumerate(zip(rows, made, strict=True)):
        at = (torch.arange(count) + slot) % max(1, slots)
        k[row][:, at], v[row][:, at] = new_k.to(dtype), new_v.to(dtype)
        positions[row, at] = torch.arange(count) + position
    return FullTokens(k, v, positions)


def unpacked(rows: Sequence[Records | None], held: Sequence[Held], form: Method, heads: int, head_dim: int) -> Any:
    """Packed tokens as the slow reader has them: float64 `[B, H, n, D]` in cache space, and positions `[B, n]`."""
    longest = max(h.groups for h in held) * form.packed_format.record_tokens
    k = torch.zeros(len(rows), heads, longest, head_dim, dtype=torch.float64)
    v, positions = k.clone(), torch.full((len(rows), longest), -1)
    for row, records in enumerate(rows):
        if records is None:
            continue
        read = slow_decoder.decode(records, form.packed_format, head_dim)
        for target, x in zip((k, v), read, strict=True):
            flat = torch.from_numpy(x).transpose(0, 1).flatten(1, 2)
            target[row, :, : flat.shape[1]] = flat
        positions[row, : flat.shape[1]] = torch.arange(flat.shape[1]) + held[row].pins
    return k, v, positions
