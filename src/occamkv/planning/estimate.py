"""The bytes of a cache at rest and while a prompt is read, for a model's sizes and a plan.

At rest is what `PackedCache.report()` shows once everything due has been packed; tests compare the two. While a prompt
is read, one layer at a time holds K and V of a step in full precision besides, and each window's tensor still lies in
the memory of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from occamkv.cache import LayerPlan, Plan
from occamkv.cache.pins import most_slots
from occamkv.cache.sizes import LayerSizes, ModelSizes
from occamkv.errors import CacheMismatch, UnsupportedFormat, UnsupportedInput
from occamkv.formats import PAGE_TOKENS, check_head_dim
from occamkv.methods import Method
from occamkv.planning.workload import Workload


@dataclass(frozen=True)
class Need:
    """Bytes of a cache. `records`, `residual` and `pins` are those of packed layers, `full` those of all others.

    `transient` is what reading the prompt takes at its peak beyond the cache at rest. `at_most` says that pins, or
    the records of a budget, depend on the text, and that their bound was counted.
    """

    records: int = 0
    residual: int = 0
    pins: int = 0
    full: int = 0
    transient: int = 0
    at_most: bool = False

    @property
    def cache(self) -> int:
        """Bytes of the cache at rest."""
        return self.records + self.residual + self.pins + self.full

    @property
    def peak(self) -> int:
        """Bytes of the cache while the prompt is read."""
        return self.cache + self.transient


def packs(entry: LayerPlan, layer: LayerSizes) -> bool:
    """Tell whether a layer is packed: by plan, and because K and V have one shape that records can hold."""
    if not entry.packs or (layer.k_heads, layer.k_dim) != (layer.v_heads, layer.v_dim):
        return False
    try:
        check_head_dim(layer.k_dim)
    except UnsupportedFormat:
        return False
    return True


def estimate(sizes: ModelSizes, plan: Plan, load: Workload) -> Need:
    """Return what a cache takes.

    Raises:
        UnsupportedInput: The workload does not go with the model.
        CacheMismatch: The plan has another number of layers.
    """
    layers = at_rest(sizes, plan, load)
    sums = {name: sum(getattr(each, name) for each in layers) for name in ("records", "residual", "pins", "full")}
    pairs = list(zip(plan.layers, sizes.layers, strict=True))
    transient = _transient(
        sizes,
        [layer for entry, layer in pairs if packs(entry, layer)],
        [layer for entry, layer in pairs if not packs(entry, layer)],
        load,
    )
    per_value = load.batch * sizes.dtype_bytes
    return Need(**sums, transient=per_value * transient, at_most=any(each.at_most for each in layers))


def at_rest(sizes: ModelSizes, plan: Plan, load: Workload) -> list[Need]:
    """Return what each layer holds once everything due has been packed; raises as `estimate` does."""
    check_workload(sizes, load)
    if len(plan.layers) != len(sizes.layers):
        raise CacheMismatch(
            f"the plan has {len(plan.layers)} layers, the model {len(sizes.layers)}. Make a plan for this model."
        )
    pairs = list(zip(plan.layers, sizes.layers, strict=True))
    budgets = _budgets((entry.method, layer) for entry, layer in pairs if packs(entry, layer))
    needs = []
    for entry, layer in pairs:
        source = layer.source_values * load.source * sizes.dtype_bytes
        if packs(entry, layer):
            need = _packed(entry.method, layer, load, sizes.dtype_bytes, budgets)
        else:
            need = Need(full=_held(layer, load) * sizes.dtype_bytes + layer.state_bytes)
        needs.append(
            Need(
                records=load.batch * need.records,
                residual=load.batch * need.residual,
                pins=load.batch * need.pins,
                full=load.batch * (need.full + source),
                at_most=need.at_most,
            )
        )
    return needs


def check_workload(sizes: ModelSizes, load: Workload) -> None:
    """Raise `UnsupportedInput` unless the numbers are allowed and go with the model."""
    for name, value, least in (("context", load.context, 1), ("batch", load.batch, 1), ("chunk", load.step, 1)):
        if value < least:
            raise UnsupportedInput(f"{name} is {value}; allowed: {least} or more.")
    if sizes.has_encoder and load.source < 1:
        raise UnsupportedInput(
            "this model has an encoder, and its decoder keeps K and V of the encoder's text. "
            "Say how long that is: --source N."
        )
    if not sizes.has_encoder and load.source:
        raise UnsupportedInput(f"source is {load.source}, but this model has no encoder. Leave it out.")


def _held(layer: LayerSizes, load: Workload) -> int:
    """Return the values that a layer in full precision holds of one sequence."""
    tokens = load.context if layer.most_tokens is None else min(load.context, layer.most_tokens)
    return tokens * layer.values


def _packed(method: Method, layer: LayerSizes, load: Workload, dtype_bytes: int, budgets: dict[float, int]) -> Need:
    """Return what a packed layer holds of one sequence; what depends on the text is counted as its bound."""
    parts = method.parts(load.context, kv_heads=layer.k_heads, head_dim=layer.k_dim, dtype_bytes=dtype_bytes)
    records = parts["packed"]
    if method.budget is not None:
        records = -(-method.held_tokens(load.context) // PAGE_TOKENS) * budgets[method.budget]
    return Need(
        records=records,
        residual=parts["residual"],
        pins=most_slots(method, load.context) * layer.values * dtype_bytes,
        at_most=method.pinning.judges or method.budget is not None,
    )


def _budgets(packed: Iterable[tuple[Method, LayerSizes]]) -> dict[float, int]:
    """Return the bytes of a page of a mean layer for each budget: the mean is over layers, so the largest counts."""
    values: dict[float, int] = {}
    for method, layer in packed:
        if method.budget is not None:
            values[method.budget] = max(values.get(method.budget, 0), layer.k_values + layer.v_values)
    return {budget: math.ceil(PAGE_TOKENS * budget * count / 8) for budget, count in values.items()}


def _transient(sizes: ModelSizes, packed: list[LayerSizes], others: list[LayerSizes], load: Workload) -> int:
    """Return the values, of one sequence, that reading the last step of a prompt takes beyond the cache at rest."""
    step, waiting = load.step, 0
    before = load.context - step
    one_at_a_time = [layer.source_values * load.source for layer in sizes.layers]
    for layer in packed:
        waits = sizes.packs_late or not layer.reads_packed or 1 < step < PAGE_TOKENS
        copies = (
            2 if layer.reads_packed and 1 < step < PAGE_TOKENS else 1
        )  # a short step keeps what attention read, too
        waiting += copies * step * layer.values if waits else 0
        one_at_a_time.append((step if layer.reads_packed else load.context) * layer.values)
    for layer in others:
        old = before * layer.v_values  # of tensors that new ones were made from: those of K are gone by then
        if layer.most_tokens is not None:  # a window keeps both to the end
            old = (min(max(0, before - step), layer.most_tokens) + min(step, before)) * layer.values
            waiting += _overhang(layer, load)
        one_at_a_time.append(old + step * layer.values)
    return waiting + max(one_at_a_time, default=0)


def _overhang(layer: LayerSizes, load: Workload) -> int:
    """Return the values of one sequence that a window's tensor holds beyond the window, after the last long step."""
    if layer.most_tokens is None:
        return 0
    return (min(load.context - load.step, layer.most_tokens) + load.step) * layer.values - _held(layer, load)


def window_overhang(sizes: ModelSizes, load: Workload) -> int:
    """Return the bytes that all windows hold, until the next step, beyond what they keep."""
    return load.batch * sizes.dtype_bytes * sum(_overhang(layer, load) for layer in sizes.layers)
