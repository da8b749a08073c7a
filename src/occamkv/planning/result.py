"""What `occamkv plan` finds: each method at the asked length, at other lengths, and which of them fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from occamkv.cache import Plan
from occamkv.cache.sizes import LayerSizes, ModelSizes
from occamkv.errors import UnsupportedInput
from occamkv.planning.estimate import estimate, packs
from occamkv.planning.fit import MOST, largest_batch, longest_context
from occamkv.planning.units import size_text, tokens_text
from occamkv.planning.workload import Workload

SCHEMA_VERSION = 1
FULL = "full"
"""The row of the cache that packs nothing; every other is compared with it."""

NOT_COUNTED = (
    "activations, attention's workspace, the runtime's own memory, what its allocator rounds up, and the statistics of "
    "balanced methods; leave room for them with --reserve"
)
_SHORTEST, _LONGEST = 2**12, 2**20
_WEIGHT_BITS = (4, 8, 16)


@dataclass(frozen=True)
class Room:
    """What the memory has to hold besides the cache; `memory` is None where nobody asked what fits. All in bytes."""

    weights: int
    memory: int | None = None
    reserve: int = 0

    @property
    def for_cache(self) -> int | None:
        """Bytes left for the cache; below 0 where the weights alone do not fit."""
        return None if self.memory is None else self.memory - self.weights - self.reserve


def weight_bytes(sizes: ModelSizes, *, bits: int | None = None) -> int:
    """Return the bytes of the weights: as the model has them, or with its matrices quantized to so many bits.

    Embeddings, output head and vectors keep the model's dtype; scales of quantized weights are not counted.

    Raises:
        UnsupportedInput: The bits are not 4, 8 or 16.
    """
    if bits is None:
        return sizes.weight_bytes
    if bits not in _WEIGHT_BITS:
        raise UnsupportedInput(f"weights-bits is {bits}; allowed: {', '.join(map(str, _WEIGHT_BITS))}.")
    rest = sizes.weight_bytes - sizes.matrix_parameters * sizes.dtype_bytes
    return rest + sizes.matrix_parameters * bits // 8


def compare(sizes: ModelSizes, plans: Mapping[str, Plan], load: Workload, room: Room) -> dict[str, Any]:
    """Return a JSON-ready comparison of plans; those of `plans` are tried in its order, the first that fits is chosen.

    Args:
        sizes: The model.
        plans: Plans by name, `full` among them.
        load: The length and the number of sequences that were asked for.
        room: Weights, memory and reserve.
    """
    rows = [_row(name, sizes, plan, plans[FULL], load, room) for name, plan in plans.items()]
    asked = [row for row in rows if row["method"] != FULL] or rows
    fitting = [row["method"] for row in asked if row["fits"]]
    return {
        "schema_version": SCHEMA_VERSION,
        "model_type": sizes.model_type,
        "parameters": sizes.parameters,
        "dtype": sizes.dtype,
        "context_limit": sizes.limit,
        "layers": _layers(sizes, asked[0]["method"], plans),
        "weights_bytes": room.weights,
        "memory_bytes": room.memory,
        "reserve_bytes": room.reserve,
        "context": load.context,
        "batch": load.batch,
        "chunk": load.chunk,
        "source": load.source,
        "methods": rows,
        "contexts": [_at(context, sizes, plans, load) for context in contexts(sizes.limit, load.context)],
        "chosen": fitting[0] if fitting else None,
        "verdict": _verdict(rows, asked, load, room),
        "not_counted": NOT_COUNTED,
    }


def contexts(limit: int | None, asked: int) -> list[int]:
    """Return the lengths of the table: 4k, 8k, ... to the model's limit (1M without one), and the one asked for."""
    last = _LONGEST if limit is None else min(limit, _LONGEST)
    found = {last, asked}
    length = _SHORTEST
    while length <= last:
        found.add(length)
        length *= 2
    return sorted(found)


def _row(name: str, sizes: ModelSizes, plan: Plan, full: Plan, load: Workload, room: Room) -> dict[str, Any]:
    need, most = estimate(sizes, plan, load), room.for_cache
    values = sum(layer.values for entry, layer in zip(plan.layers, sizes.layers, strict=True) if packs(entry, layer))
    return {
        "method": name,
        "bits_per_value": _bits(sizes, plan) if values else 8.0 * sizes.dtype_bytes,
        "records_bytes": need.records,
        "residual_bytes": need.residual,
        "pin_bytes": need.pins,
        "full_bytes": need.full,
        "cache_bytes": need.cache,
        "ratio": estimate(sizes, full, load).cache / need.cache if need.cache else 1.0,
        "transient_bytes": need.transient,
        "total_bytes": room.weights + room.reserve + need.peak,
        "at_most": need.at_most,
        "fits": None if most is None else need.peak <= most,
        "longest_context": None if most is None else longest_context(sizes, plan, load, most),
        "largest_batch": None if most is None else largest_batch(sizes, plan, load, most),
    }


def _bits(sizes: ModelSizes, plan: Plan) -> float:
    """Return the mean bits of a value of the packed layers; a budget counts as what it allows."""
    bits = values = 0.0
    for entry, layer in zip(plan.layers, sizes.layers, strict=True):
        if packs(entry, layer):
            own = entry.method.budget or entry.method.bits_per_value(kv_heads=layer.k_heads, head_dim=layer.k_dim)
            bits, values = bits + own * layer.values, values + layer.values
    return bits / values


def _at(context: int, sizes: ModelSizes, plans: Mapping[str, Plan], load: Workload) -> dict[str, Any]:
    needs = {name: estimate(sizes, plan, load.with_context(context)) for name, plan in plans.items()}
    return {
        "context": context,
        "caches": {
            name: {
                "cache_bytes": need.cache,
                "transient_bytes": need.transient,
                "ratio": needs[FULL].cache / need.cache if need.cache else 1.0,
            }
            for name, need in needs.items()
        },
    }


def _layers(sizes: ModelSizes, name: str, plans: Mapping[str, Plan]) -> list[dict[str, Any]]:
    """Return kinds of layers: how many, what they keep of a token, and why they are not packed, if they are not."""
    pairs = zip(plans[name].layers, sizes.layers, strict=True)
    kinds = [
        (
            packs(entry, layer),
            "" if packs(entry, layer) else _reason(layer, entry.reason),
            *(layer.k_heads, layer.k_dim, layer.v_heads, layer.v_dim, layer.most_tokens, layer.state_bytes),
            *(layer.source_values, layer.other_values),
        )
        for entry, layer in pairs
    ]
    words = ("packed", "reason", "k_heads", "k_dim", "v_heads", "v_dim", "most_tokens", "state_bytes")
    return [
        {"layers": len(list(same)), **dict(zip((*words, "source_values", "other_values"), kind, strict=True))}
        for kind, same in groupby(sorted(kinds, key=repr))
    ]


def _reason(layer: LayerSizes, told: str | None) -> str:
    """Return why a layer is not packed, by what it really keeps."""
    if (layer.k_heads, layer.k_dim) != (layer.v_heads, layer.v_dim):
        return (
            f"its cache gets K of {layer.k_heads} x {layer.k_dim} and V of {layer.v_heads} x {layer.v_dim} channels "
            "(latent attention, for example); records hold K and V of one shape"
        )
    return told or "its head_dim cannot be stored in records"


def _verdict(rows: list[dict[str, Any]], asked: list[dict[str, Any]], load: Workload, room: Room) -> str:
    """Say in words what fits."""
    if room.memory is None:
        return "say --memory to learn what fits"
    memory, what = size_text(room.memory), f"{load.batch} x {tokens_text(load.context)} tokens"
    if room.for_cache is None or room.for_cache <= 0:
        reserve = f" and the reserve of {size_text(room.reserve)}" if room.reserve else ""
        return (
            f"nothing fits into {memory}: the weights take {size_text(room.weights)}{reserve}. Take more memory, or "
            "quantized weights: --weights-bits 4, or --weights with their size."
        )
    fitting = next((row for row in asked if row["fits"]), None)
    if fitting is not None:
        full = rows[0]["fits"]
        beside = "" if fitting is rows[0] else f"; the full cache would {'fit too' if full else 'not fit'}"
        return f"{what} fit into {memory} with {fitting['method']}: {size_text(fitting['total_bytes'])}{beside}"
    least = min(asked, key=lambda row: int(row["total_bytes"]))
    return (
        f"{what} do not fit into {memory}: {least['method']} takes {size_text(least['total_bytes'])}. "
        f"With {least['method']} fit {count_text(least['longest_context'])} tokens"
        + (f" in each of {load.batch} sequences" if load.batch > 1 else "")
        + (f", or {least['largest_batch']} sequences of this length" if least["largest_batch"] else "")
        + "; more with --chunk, which reads the prompt in pieces."
    )


def count_text(number: int) -> str:
    """Return a count in words, `no end` where a search found none."""
    return "without end" if number >= MOST else f"{number:,}"
