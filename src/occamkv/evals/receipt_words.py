"""The verdict of a receipt: one plain sentence, computed from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdict(told: Mapping[str, Any]) -> str:
    """Return what a receipt says, in one sentence; `told` is the receipt without it."""
    failed = [check["name"] for check in told["controls"] if not check["passed"]]
    packed = packed_layers(told)
    if not any(layer["packed_tokens"] for layer in packed):
        tokens, start = (max((layer[key] for layer in packed), default=0) for key in ("tokens", "packing_starts"))
        return f"Nothing is proven: nothing was packed, for {tokens} tokens are held and packing starts at {start}."
    if failed:
        return f"Void: its figures say nothing about the cache, for this did not hold: {'; '.join(failed)}."
    return "; ".join([_size(told, packed), _fidelity(told), _live(told), _controls(told)]) + "."


def packed_layers(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the layers of a receipt that are quantized by plan."""
    return [layer for layer in told["layers"] if layer["reason"] is None and layer["method"] != "full"]


def methods_of(layers: list[Mapping[str, Any]]) -> str:
    """Return the method of these layers, or how many there are."""
    names = {layer["method"] for layer in layers}
    return names.pop() if len(names) == 1 else f"a plan of {len(names)} methods"


def _size(told: Mapping[str, Any], packed: list[Mapping[str, Any]]) -> str:
    size, tokens = told["bytes"], max(layer["tokens"] for layer in packed)
    return (
        f"{methods_of(packed)} holds {tokens:,} tokens in {size['cache'] / 2**20:.2f} MiB instead of "
        f"{size['full'] / 2**20:.2f} ({size['full'] / size['cache']:.1f}x smaller)"
    )


def _fidelity(told: Mapping[str, Any]) -> str:
    found = told["fidelity"]
    if found is None:
        return f"what that changes in the logits was not measured ({told['fidelity_skipped']})"
    return (
        f"{100 * found['same_top']:.1f} % of the last {found['positions']} prompt tokens keep their most likely next "
        f"token (KL {found['kl_mean']:.4f} nats)"
    )


def _live(told: Mapping[str, Any]) -> str:
    live = told["live"]
    if live is None or live["error_mean"] is None:
        return "no step of the live run was verified"
    layers = sum(layer["steps"] > 0 for layer in live["layers"])
    steps = "1 step" if live["steps"] == 1 else f"{live['steps']} steps"
    return (
        f"in the live run the attention output of {layers} of {live['packed_layers']} packed layers was "
        f"{100 * live['error_mean']:.1f} % off on {steps} ({100 * live['error_max']:.1f} % at worst)"
    )


def _controls(told: Mapping[str, Any]) -> str:
    count = len(told["controls"])
    return "the only control held" if count == 1 else f"all {count} controls held"
