"""Attention of one layer for one new token on a GPU, against the fastest of what attends in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from occamkv import kernels
from occamkv.bench.attend import OURS
from occamkv.bench.gpu_ceilings import Ceilings
from occamkv.bench.gpu_stock import makers, missing, refusal
from occamkv.bench.gpu_timing import (
    ENDS_A_CASE,
    REFUSALS,
    Budget,
    Dropped,
    Rig,
    check_setting,
    first_line,
    left_out,
    most_calls,
    spread,
    take_turns,
)
from occamkv.bench.inputs import MOST_TOKENS, Progress, Shape, check_list, packing_method
from occamkv.bench.scene import DTYPE, Scene, packed_scene
from occamkv.bench.timing import Times
from occamkv.errors import UnsupportedInput
from occamkv.formats.records import pages_of
from occamkv.methods import Method

STEP = "ours_step"
"""Append and attend, where the backend has a call for both; the other contestants only attend."""

SHAPES = ("32/8/128", "8/8/128", "64/8/128", "32/8/64", "16/4/256")
CONTEXTS = (32 * 1024, 128 * 1024, 4 * 1024, 8 * 1024, 64 * 1024, 16 * 1024)
BATCHES = (8, 1, 64, 16, 32, 4, 2)
_MOST_BATCH = 512


@dataclass(frozen=True)
class GpuCase:
    """One layer, so many sequences, so many tokens each."""

    shape: Shape
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.context} tokens, batch {self.batch}"

    @property
    def stock_bytes(self) -> int:
        """Bytes of K and V in bfloat16."""
        return 4 * self.batch * self.context * self.shape.kv_heads * self.shape.head_dim


@dataclass(frozen=True)
class GpuSetting:
    """What `bench_gpu_attend` is asked for; shapes, contexts and batches in order of value.

    Raises:
        UnsupportedInput: A value is not allowed, or a context is so short that nothing is packed.
    """

    shapes: Sequence[Shape]
    contexts: Sequence[int] = CONTEXTS
    batches: Sequence[int] = BATCHES
    methods: Sequence[str] = ("oscar", "occam")
    repetitions: int = 9
    budget_seconds: float = 180

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_list("contexts", self.contexts, 1, MOST_TOKENS)
        check_list("batches", self.batches, 1, _MOST_BATCH)
        names = [shape.name for shape in self.shapes]
        if not names or len(set(names)) < len(names):
            raise UnsupportedInput(f"shapes are {', '.join(names)!r}; allowed: one or more, each once.")
        given: dict[str, Any] = {"budget_seconds": self.budget_seconds, "shortest": min(self.contexts)}
        check_setting(self.methods, self.repetitions, **given)

    @property
    def chosen(self) -> list[Method]:
        """The methods."""
        return [packing_method(name) for name in self.methods]

    def cases(self) -> list[GpuCase]:
        """Return all combinations, the most valuable first: those of which all three parts stand far in front."""
        parts = (enumerate(self.shapes), enumerate(self.contexts), enumerate(self.batches))
        ranked = sorted(product(*parts), key=lambda case: sum(place for place, _ in case))
        return [GpuCase(shape, context, batch) for (_, shape), (_, context), (_, batch) in ranked]


def bench_gpu_attend(
    setting: GpuSetting, rig: Rig, ceilings: Ceilings, *, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time attention for all cases that memory and budget allow.

    Returns:
        A row for each case and method, and a sentence for each case that was left out.
    """
    budget = Budget(setting.budget_seconds)
    rows: list[dict[str, Any]] = []
    dropped = []
    cases = setting.cases()
    for done, case in enumerate(cases):
        if budget.used:
            dropped.append(f"{case}: the budget of {setting.budget_seconds:g} s was used up")
        else:
            try:
                rows += _rows(case, setting, rig, ceilings)
            except ENDS_A_CASE as reason:
                dropped.append(f"{case}: {left_out(reason)}")
        if progress is not None:
            progress("attention", done + 1, len(cases))
        if rig.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, dropped


def _rows(case: GpuCase, setting: GpuSetting, rig: Rig, ceilings: Ceilings) -> list[dict[str, Any]]:
    needed = case.stock_bytes * (rig.copies(case.stock_bytes) + len(setting.methods) / 3)
    if needed > rig.memory_bytes:
        raise Dropped(f"it takes {needed / 2**30:.1f} GiB, {rig.memory_bytes / 2**30:.1f} may be filled")
    replays: dict[str, Callable[[], float]] = {}
    scenes: dict[str, Scene] = {}
    copies: dict[str, int] = {}
    for one in setting.chosen:
        name = str(one)
        some = list(_scenes(case, one, rig, room=pages_of(most_calls(setting.repetitions)) + 1))
        scenes[name], copies[name] = some[0], len(some)
        replays[f"{OURS} {name}"] = rig.replayed([partial(scene.attend, scene.q) for scene in some])
        if some[0].stepper is not None:
            replays[f"{STEP} {name}"] = rig.replayed([scene.step for scene in some])
    stock, skipped = _stock(case, rig)
    if not stock:
        raise Dropped(f"nothing in bfloat16 takes it ({skipped})")
    found = take_turns(replays | stock, setting.repetitions)
    rivals = {name: found[name] for name in stock}
    rows = []
    for one in setting.chosen:
        own = {label: found[key] for label in (OURS, STEP) if (key := f"{label} {one}") in found}
        row = _row(case, one, scenes[str(one)], own | rivals, ceilings)
        rows.append(row | {"copies": copies[str(one)], "skipped": skipped})
    return rows


def _scenes(case: GpuCase, method: Method, rig: Rig, *, room: int = 0) -> Iterator[Scene]:
    """Yield equal caches, each in memory of its own, more than the GPU's cache holds."""
    backend = kernels.backend_for(method.packed_format, rig.device, case.shape.head_dim)
    options: dict[str, Any] = {"context": case.context, "batch": case.batch, "device": rig.device, "room": room}
    first = packed_scene(case.shape, method, backend, **options)
    yield first
    for _ in range(rig.copies(bytes_read(first)) - 1):
        yield packed_scene(case.shape, method, backend, **options)


def bytes_read(scene: Scene) -> int:
    """Return the bytes that a call must read: pages, and tokens in full precision."""
    held = sum(2 * part.k.element_size() * int((part.positions >= 0).sum()) for part in scene.full)
    return scene.packed_bytes + held * scene.new[0].shape[1] * scene.q.shape[3]


def _stock(case: GpuCase, rig: Rig) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return the replays of all rivals that take this case, and why others do not."""
    shape, skipped = case.shape, {}
    sizes = (case.batch, shape.kv_heads, case.context, shape.head_dim)
    inputs = [
        [_random(rig, case.batch, shape.query_heads, 1, shape.head_dim), _random(rig, *sizes), _random(rig, *sizes)]
        for _ in range(rig.copies(case.stock_bytes))
    ]
    replays = {}
    for name, make in makers(rig, group=shape.query_heads // shape.kv_heads).items():
        reason = missing(name)
        if reason is None:
            try:
                calls = [make(*given) for given in inputs]
                reason = refusal(calls[0])
                if reason is None:
                    replays[name] = rig.replayed(calls)
            except REFUSALS as error:
                reason = first_line(error)
        if reason is not None:
            skipped[name] = reason
    return replays, skipped


def _random(rig: Rig, *sizes: int) -> torch.Tensor:
    return torch.randn(sizes, dtype=DTYPE, device=rig.device)


def _row(case: GpuCase, method: Method, scene: Scene, times: dict[str, Times], ceilings: Ceilings) -> dict[str, Any]:
    nbytes, shape, ours = bytes_read(scene), case.shape, times[OURS]
    rivals = {name: each for name, each in times.items() if name not in (OURS, STEP)}
    best = min(rivals, key=lambda name: rivals[name].ms)
    speed = nbytes / ours.ms / 1e6
    return {
        "shape": shape.name,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "context": case.context,
        "batch": case.batch,
        "method": str(method),
        "backend": scene.backend.name,
        "bits": method.bits_per_value(kv_heads=shape.kv_heads, head_dim=shape.head_dim),
        "read_bytes": nbytes,
        "stock_bytes": case.stock_bytes,
        "ours_ms": ours.ms,
        "floor_ms": nbytes / ceilings.read_gb_per_s / 1e6,
        "gb_per_s": speed,
        "share_of_read": speed / ceilings.read_gb_per_s,
        "best_stock": best,
        "best_stock_ms": rivals[best].ms,
        "ratio": rivals[best].ms / ours.ms,
        "ratio_step": rivals[best].ms / times[STEP].ms if STEP in times else None,
        "ratio_of_bytes": case.stock_bytes / nbytes,
        "contestants": {name: spread(each) for name, each in times.items()},
    }
