"""Whole models on a GPU: captured decode steps with a packed cache, against the same model with a static cache.

Caches are filled directly with random K and V. The static cache is transformers' own, in the model's dtype; besides
transformers' attention, which masks it, kernels that need no mask read it: all its slots are filled.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import Cache

from occamkv.bench.attend import OURS
from occamkv.bench.decode import STOCK, fill, layer_shapes, vocabulary
from occamkv.bench.gpu_stock import KERNELS, refusal, sdpa
from occamkv.bench.gpu_timing import (
    ENDS_A_CASE,
    REFUSALS,
    Budget,
    Dropped,
    Rig,
    check_setting,
    first_line,
    left_out,
    spread,
    take_turns,
)
from occamkv.bench.inputs import MOST_TOKENS, Progress, check_list, packing_method
from occamkv.bench.timing import Times
from occamkv.integrations.transformers import PackedCache
from occamkv.integrations.transformers.attention import NAME
from occamkv.integrations.transformers.model import text_config, use_attention
from occamkv.integrations.transformers.replay import CapturedStep
from occamkv.methods import Method

STATIC = "static_sdpa"
"""`StaticCache` with transformers' own attention."""

_ROOM = 32  # steps that a static cache takes before it is full: more than a clock runs at once
_PIECE, _LEAST_PIECE = 2**16, 2**10  # tokens of all sequences, and of each, that a cache is filled with at a time
_SEED = 0


@dataclass(frozen=True)
class GpuDecodeSetting:
    """What is asked for, in order of value.

    Args:
        contexts: Measured at batch 1.
        batches: Measured at each of `batch_contexts`.
        batch_contexts: For these the largest batch is looked for, too.
        prefill_contexts: Prompts that are read in one call.
        memory_gib: Sizes of memory for which the largest batch is computed.
        methods: Names.
        steps: Tokens decoded in a turn.
        repetitions: Turns.
        budget_seconds: What is not begun by then is left out.
    """

    contexts: Sequence[int] = (128 * 1024, 32 * 1024, 4 * 1024, 8 * 1024, 64 * 1024, 16 * 1024)
    batches: Sequence[int] = (48, 8, 16)
    batch_contexts: Sequence[int] = (4 * 1024, 32 * 1024)
    prefill_contexts: Sequence[int] = (32 * 1024,)
    memory_gib: Sequence[int] = (80, 141)
    methods: Sequence[str] = ("oscar", "occam")
    steps: int = 8
    repetitions: int = 5
    budget_seconds: float = 150

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_list("contexts", self.contexts, _ROOM, MOST_TOKENS)
        check_list("batch contexts", self.batch_contexts, _ROOM, MOST_TOKENS)
        check_list("batches", self.batches, 2, 512)
        check_list("steps", (self.steps,), 1, _ROOM)
        if self.prefill_contexts:
            check_list("prefill contexts", self.prefill_contexts, 2, MOST_TOKENS)
        shortest = min(*self.contexts, *self.batch_contexts)
        given: dict[str, Any] = {"budget_seconds": self.budget_seconds, "shortest": shortest}
        check_setting(self.methods, self.repetitions, newest=self.all_steps, **given)

    @property
    def all_steps(self) -> int:
        """Steps of all turns, two that do not count among them; so many of a context's tokens are decoded."""
        return (self.repetitions + 2) * self.steps

    @property
    def chosen(self) -> list[Method]:
        """The methods."""
        return [packing_method(name) for name in self.methods]

    def jobs(self) -> list[tuple[int, int]]:
        """Return (context, batch): batch 1 and larger ones in turns, each in order of value."""
        single = enumerate((context, 1) for context in self.contexts)
        several = enumerate((context, batch) for batch, context in product(self.batches, self.batch_contexts))
        return [job for _, job in sorted([*single, *several], key=lambda ranked: ranked[0])]


@dataclass(frozen=True)
class Entrant:
    """Steps of a model with one cache: what must be done before a turn without being timed, and the turn."""

    prepare: Callable[[], object]
    turn: Callable[[], float]

    def __call__(self) -> float:
        """Return the milliseconds of a step."""
        self.prepare()
        return self.turn()


class ModelSteps:
    """One model on one device, and its decode steps with either cache."""

    def __init__(self, model: Any, rig: Rig, setting: GpuDecodeSetting) -> None:
        self.model, self.rig, self.setting = model, rig, setting
        self.shapes = layer_shapes(model)
        self.weight_bytes = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))

    def stock_bytes(self, context: int, batch: int) -> int:
        """Return the bytes of a static cache."""
        per_token = sum(2 * heads * head_dim for heads, head_dim in self.shapes)
        return batch * context * per_token * int(self.model.dtype.itemsize)

    def packed_bytes(self, method: Method, context: int, batch: int) -> int:
        """Return the bytes of a packed cache, as `occamkv plan` computes them."""
        itemsize = int(self.model.dtype.itemsize)
        parts = (method.parts(context, kv_heads=h, head_dim=d, dtype_bytes=itemsize) for h, d in self.shapes)
        return batch * sum(sum(of_layer.values()) for of_layer in parts)

    def static(self, context: int, batch: int, *, masked: bool = True) -> tuple[dict[str, Entrant], dict[str, str]]:
        """Return the entrants that read one filled static cache, with `STATIC` among them or without, and why not."""
        cache = StaticCache(config=text_config(self.model.config), max_cache_len=context)
        self._fill(cache, context - _ROOM, batch)
        entrants, skipped = {}, {}
        for name in (*([STATIC] if masked else []), *_unmasked(self.rig)):
            attention = "sdpa" if name == STATIC else name
            prepare = partial(self._rewind, cache, context - _ROOM, attention)
            call = partial(self._step, cache, batch)
            prepare()
            reason = refusal(call)
            if reason is None:
                try:
                    prepare()
                    entrants[name] = Entrant(prepare, self.rig.replayed([call]))
                except REFUSALS as error:
                    reason = first_line(error)
            if reason is not None:
                skipped[name] = reason
        return entrants, skipped

    def packed(self, method: Method, context: int, batch: int, stack: ExitStack) -> tuple[Entrant, PackedCache]:
        """Return the entrant with a packed cache, and that; the end of `stack` ends the capture."""
        total = self.setting.all_steps
        cache = PackedCache(self.model, method)
        prepare = partial(use_attention, self.model, NAME)
        prepare()
        self._fill(cache, context - total, batch)
        tokens = torch.ones(batch, 1, dtype=torch.int64, device=self.rig.device)
        captured = stack.enter_context(CapturedStep(self.model, cache, steps=total))
        return Entrant(prepare, self.rig.queued([partial(captured, tokens)] * self.setting.steps)), cache

    def prefill(self, context: int) -> dict[str, Times]:
        """Return the times of one call that reads a prompt, by method and `STOCK`."""
        generator = torch.Generator().manual_seed(_SEED)
        prompt = torch.randint(vocabulary(self.model), (1, context), generator=generator).to(self.rig.device)

        def read(new_cache: Callable[[], Cache]) -> Tensor:
            return self.model(prompt, past_key_values=new_cache(), logits_to_keep=1).logits

        dynamic = partial(DynamicCache, config=text_config(self.model.config))
        entrants = {STOCK: self._reading(partial(read, dynamic), "sdpa")}
        for one in self.setting.chosen:
            entrants[str(one)] = self._reading(partial(read, partial(PackedCache, self.model, one)), NAME)
        return take_turns(entrants, 3)

    def _reading(self, call: Callable[[], Tensor], attention: str) -> Entrant:
        prepare = partial(use_attention, self.model, attention)
        prepare()
        return Entrant(prepare, self.rig.queued([call]))

    def _fill(self, cache: Cache, tokens: int, batch: int) -> None:
        piece = max(_LEAST_PIECE, _PIECE // batch)
        with torch.no_grad():
            fill(cache, self.shapes, tokens, dtype=self.model.dtype, batch=batch, device=self.rig.device, piece=piece)

    def _rewind(self, cache: StaticCache, tokens: int, attention: str) -> None:
        use_attention(self.model, attention)
        for layer in cache.layers:
            cast(Any, layer).cumulative_length.fill_(tokens)

    def _step(self, cache: Cache, batch: int) -> Tensor:
        tokens = torch.ones(batch, 1, dtype=torch.int64, device=self.rig.device)
        return self.model(tokens, past_key_values=cache, logits_to_keep=1).logits


def bench_gpu_decode(
    model: Any, setting: GpuDecodeSetting, rig: Rig, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Time steps and prefill of a model; return `rows`, `prefill`, `weight_bytes` and what was `dropped`."""
    from occamkv.bench.gpu_capacity import computed, tried

    budget = Budget(setting.budget_seconds)
    steps = ModelSteps(model, rig, setting)
    jobs: list[tuple[str, partial[list[dict[str, Any]]]]] = [
        ("rows", partial(_rows, steps, context, batch)) for context, batch in setting.jobs()
    ]
    jobs[3:3] = [("prefill", partial(_prefill_rows, steps, context)) for context in setting.prefill_contexts]
    for one in (*setting.chosen, None):
        jobs += [("tried", partial(tried, steps, context, one)) for context in setting.batch_contexts]
    found: dict[str, Any] = {"rows": [], "prefill": [], "tried": [], "dropped": []}
    for done, (kind, job) in enumerate(jobs):
        told = f"{kind} {', '.join(map(str, job.args[1:]))}"
        if budget.used:
            found["dropped"].append(f"{told}: the budget of {setting.budget_seconds:g} s was used up")
            continue
        try:
            found[kind] += job()
        except ENDS_A_CASE as reason:
            found["dropped"].append(f"{told}: {left_out(reason)}")
        release(rig)
        if progress is not None:
            progress("decoding", done + 1, len(jobs))
    return found | {"weight_bytes": steps.weight_bytes, "capacity": computed(steps)}


def release(rig: Rig) -> None:
    """Give the memory of caches back that nothing holds any more."""
    gc.collect()
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()


def _rows(steps: ModelSteps, context: int, batch: int) -> list[dict[str, Any]]:
    setting = steps.setting
    stock_bytes = steps.stock_bytes(context, batch)
    needed = stock_bytes + sum(steps.packed_bytes(one, context, batch) for one in setting.chosen)
    room = steps.rig.memory_bytes - steps.weight_bytes
    if needed > room:
        raise Dropped(f"the caches take {needed / 2**30:.1f} GiB, {room / 2**30:.1f} are left beside the weights")
    with ExitStack() as stack:
        packed = {str(one): steps.packed(one, context, batch, stack) for one in setting.chosen}
        static, skipped = steps.static(context, batch)
        if not static:
            raise Dropped(f"no static cache runs ({skipped})")
        ours = {name: entrant for name, (entrant, _) in packed.items()}
        found = take_turns(ours | static, setting.repetitions)
    rivals = {name: found[name] for name in static}
    best = min(rivals, key=lambda name: rivals[name].ms)
    return [
        {
            "context": context,
            "batch": batch,
            "method": name,
            "steps": setting.steps,
            "cache_bytes": cache.nbytes(),
            "stock_bytes": stock_bytes,
            **_compared(found[name], rivals[best], batch),
            "best_stock": best,
            "contestants": {each: spread(times) for each, times in ({OURS: found[name]} | rivals).items()},
            "skipped": skipped,
        }
        for name, (_, cache) in packed.items()
    ]


def _prefill_rows(steps: ModelSteps, context: int) -> list[dict[str, Any]]:
    found = steps.prefill(context)
    stock = found.pop(STOCK)
    return [
        {
            "context": context,
            "batch": 1,
            "method": name,
            **_compared(ours, stock, context),
            "contestants": {OURS: spread(ours), STOCK: spread(stock)},
        }
        for name, ours in found.items()
    ]


def _compared(ours: Times, stock: Times, tokens: int) -> Mapping[str, float]:
    return {
        "ours_ms": ours.ms,
        "stock_ms": stock.ms,
        "ours_tokens_per_s": 1000 * tokens / ours.ms,
        "stock_tokens_per_s": 1000 * tokens / stock.ms,
        "ratio": stock.ms / ours.ms,
    }


def _unmasked(rig: Rig) -> list[str]:
    """Register SDPA with one kernel each, without a mask, as attention of transformers; return their names."""
    kernels = KERNELS if rig.device.type == "cuda" else {"math": torch.nn.attention.SDPBackend.MATH}
    for name, kernel in kernels.items():

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, kernel: Any = kernel, **_: Any) -> Any:
            return sdpa(kernel, "gqa", q, k, v).transpose(1, 2).contiguous(), None

        AttentionInterface.register(f"static_{name}", attend)
        AttentionMaskInterface.register(f"static_{name}", _no_mask)
    return [f"static_{name}" for name in kernels]


def _no_mask(*_: Any, **__: Any) -> None:
    return None
