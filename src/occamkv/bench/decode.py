"""Whole models: greedy decoding steps and prefill with a packed cache, against transformers' own cache with SDPA.

For steps the caches are filled directly with random K and V: the text that comes out means nothing, the time does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from occamkv import kernels
from occamkv.bench.attend import OURS
from occamkv.bench.inputs import CPU, Progress, Setting, backend_of, check_list, packed_of, ticker
from occamkv.bench.timing import Contestant, Times, race
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers import PackedCache
from occamkv.integrations.transformers.attention import NAME
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.model import text_config, use_attention
from occamkv.methods import Method

STOCK = "stock"
"""`DynamicCache` and transformers' SDPA attention."""

MOST_STEPS = 512
_FILL = 4096  # tokens that a cache is filled with at a time
_SEED = 0


@dataclass(frozen=True)
class Prefill:
    """Prompts of so many tokens, read in one call, this many times."""

    contexts: Sequence[int] = ()
    repetitions: int = 3


@dataclass(frozen=True)
class Decoding:
    """What `bench_decode` found: rows for greedy steps and rows for prefill."""

    rows: list[dict[str, Any]]
    prefill: list[dict[str, Any]]


def bench_decode(
    models: Mapping[str, Mapping[str, Callable[[], Any]]],
    setting: Setting,
    *,
    steps: int = 32,
    prefill: Prefill | None = None,
    progress: Progress | None = None,
) -> Decoding:
    """Time greedy decoding for all models, dtypes, contexts, numbers of threads and methods; one row for each.

    One model is held at a time. Packed caches and the stock cache of the same model take turns in one race; the best
    stock of a row is taken over all dtypes of the run. Contexts grow by `steps` with every turn, alike for all.

    Args:
        models: `{name: {dtype: load}}`; `load()` returns the model in that dtype.
        setting: Contexts, methods, threads, repetitions, backend.
        steps: Tokens decoded in a turn.
        prefill: Prompts to be read, by the first model only.
        progress: Told after each round.

    Raises:
        UnsupportedInput: A value is not allowed, or a context is so short that nothing is packed.
        NothingQuantized: A model has no layer that can be packed.
    """
    check_list("steps", (steps,), 1, MOST_STEPS)
    wanted = prefill or Prefill()
    _check_prefill(wanted, setting)
    for one in setting.chosen:
        packed_of(one, min(setting.contexts), 1)
    rows: list[dict[str, Any]] = []
    prefill_rows: list[dict[str, Any]] = []
    for name, loaders in models.items():
        of_model: list[dict[str, Any]] = []
        for dtype, load in loaders.items():
            job = _Job(name, dtype, load(), setting, progress)
            for context in sorted(setting.contexts):
                of_model += job.decode(context, steps)
            if not prefill_rows or prefill_rows[0]["shape"] == name:
                prefill_rows += [row for context in wanted.contexts for row in job.prefill(context, wanted.repetitions)]
            del job
            gc.collect()  # the next model may need the memory of this one
        rows += [row | _best(row, of_model) for row in of_model]
    return Decoding(rows, prefill_rows)


def _check_prefill(prefill: Prefill, setting: Setting) -> None:
    if not prefill.contexts:
        return
    check_list("prefill contexts", prefill.contexts, 2, 2**17)
    check_list("prefill repetitions", (prefill.repetitions,), 1, 99)
    for one in setting.chosen:
        taken = backend_of(one, None).name
        if backend_of(one, setting.backend).name != taken:
            raise UnsupportedInput(
                f"prefill is measured with the backend that a cache takes by itself, {taken!r} for {one}; got "
                f"{setting.backend!r}. Leave the prefill contexts out."
            )


def _best(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare with the fastest stock of all dtypes at the same context and threads."""
    alike = [other for other in rows if all(other[key] == row[key] for key in ("context", "threads"))]
    best = min(alike, key=lambda other: float(other["stock_ms"]))
    return {"ratio_best_stock": best["stock_ms"] / row["ours_ms"], "best_stock": f"{STOCK}_{best['dtype']}"}


@dataclass(frozen=True)
class _Job:
    """One model in one dtype."""

    name: str
    dtype: str
    model: Any
    setting: Setting
    progress: Progress | None

    def decode(self, context: int, steps: int) -> list[dict[str, Any]]:
        """Return the rows of one context."""
        rows = []
        for threads in self.setting.threads:
            stage = f"{self.name}, {self.dtype}, {context} tokens, threads {threads}"
            packed = {str(one): self._packed(one) for one in self.setting.chosen}
            stock = DynamicCache(config=text_config(self.model.config))
            caches: dict[str, Cache] = {**packed, STOCK: stock}
            shapes = layer_shapes(self.model)
            filled = ticker(self.progress, f"{stage}: filling", len(caches))
            for cache in caches.values():
                fill(cache, shapes, context - 1, dtype=self.model.dtype, backend=self.setting.backend)
                if filled is not None:
                    filled()
            sizes = {name: cache.nbytes() for name, cache in packed.items()} | {
                STOCK: sum(k.nbytes + v.nbytes for k, v in keys_and_values(stock))
            }
            entrants = [
                Contestant(name, partial(greedy, self.model, cache, steps), self._attention(name))
                for name, cache in caches.items()
            ]
            tick = ticker(self.progress, stage, self.setting.repetitions + 1)
            found = race(entrants, repetitions=self.setting.repetitions, threads=threads, per_call=steps, tick=tick)
            for name, cache in packed.items():
                extra = {
                    "steps": steps,
                    "backend": _backend_name(cache),
                    "cache_bytes": sizes[name],
                    "stock_bytes": sizes[STOCK],
                }
                rows.append(self._row(name, context, threads, found) | extra)
        return rows

    def prefill(self, context: int, repetitions: int) -> list[dict[str, Any]]:
        """Return the rows of one prompt length."""
        generator = torch.Generator().manual_seed(_SEED)
        prompt = torch.randint(vocabulary(self.model), (1, context), generator=generator)

        def read(new_cache: Callable[[], Cache]) -> None:
            self.model(prompt, past_key_values=new_cache(), logits_to_keep=1)

        makers: dict[str, Callable[[], Cache]] = {str(one): partial(self._packed, one) for one in self.setting.chosen}
        makers[STOCK] = lambda: DynamicCache(config=text_config(self.model.config))
        rows = []
        for threads in self.setting.threads:
            tick = ticker(self.progress, f"{self.name}, {self.dtype}, prefill {context}", repetitions)
            entrants = [Contestant(name, partial(read, make), self._attention(name)) for name, make in makers.items()]
            found = race(entrants, repetitions=repetitions, threads=threads, warm_up=False, tick=tick)
            rows += [self._row(name, context, threads, found) for name in makers if name != STOCK]
        return rows

    def _packed(self, method: Method) -> PackedCache:
        return PackedCache(self.model, method)

    def _attention(self, name: str) -> Callable[[], object]:
        return partial(use_attention, self.model, "sdpa" if name == STOCK else NAME)

    def _row(self, name: str, context: int, threads: int, found: Mapping[str, Times]) -> dict[str, Any]:
        ours, stock = found[name], found[STOCK]
        return {
            "shape": self.name,
            "dtype": self.dtype,
            "context": context,
            "method": name,
            "threads": threads,
            "ours_ms": ours.ms,
            "stock_ms": stock.ms,
            "ratio_enable_gqa": stock.ms / ours.ms,
            "contestants": {OURS: ours.to_json(), STOCK: stock.to_json()},
        }


@torch.no_grad()
def greedy(model: Any, cache: Cache, steps: int) -> Tensor:
    """Decode `steps` tokens, each the likeliest one; return the last, `[1, 1]`."""
    token = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    for _ in range(steps):
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
    return token


def vocabulary(model: Any) -> int:
    """Return how many tokens the model knows."""
    return int(model.get_input_embeddings().num_embeddings)


@torch.no_grad()
def layer_shapes(model: Any) -> list[tuple[int, int]]:
    """Return (KV heads, head_dim) of each layer of the model's cache, by asking it for one token."""
    cache = DynamicCache(config=text_config(model.config))
    greedy(model, cache, 1)
    shapes = [(keys.shape[1], keys.shape[3]) for keys, _ in keys_and_values(cache)]
    if len(shapes) < len(cache.layers):
        raise UnsupportedInput(
            f"{type(model).__name__} has layers without keys and values; allowed: models whose layers all have them."
        )
    return shapes


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return K and V of the layers that hold some."""
    found = ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers)
    return [(k, v) for k, v in found if isinstance(k, Tensor) and isinstance(v, Tensor)]


def fill(
    cache: Cache,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    *,
    dtype: torch.dtype,
    backend: str | None = None,
    batch: int = 1,
    device: torch.device = CPU,
    piece: int = _FILL,
) -> None:
    """Put random K and V of `tokens` tokens into every layer, `piece` at a time; pack what is due.

    Every cache gets the same, and so does every sequence of a batch.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    for index, (heads, head_dim) in enumerate(shapes):
        for first in range(0, tokens, piece):
            sizes = (1, heads, min(piece, tokens - first), head_dim)
            k, v = (torch.randn(sizes, generator=generator, device=device).to(dtype) for _ in range(2))
            cache.update(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1), index)
            layer = cache.layers[index]
            if isinstance(layer, PackedLayer) and layer.cache is not None:
                if backend is not None and layer.cache.store is not None:  # nothing is packed yet
                    layer.cache.store.backend_name = backend
                    layer.cache.store.pool.order = kernels.backend(backend).order
                layer.cache.commit()
                if first == 0 and piece != _FILL and layer.cache.store is not None:
                    layer.cache.store.reserve([tokens - sizes[2]] * batch)  # few slabs, as after a long prompt


def _backend_name(cache: PackedCache) -> str:
    return next(row.backend for row in cache.report().layers if row.backend)
