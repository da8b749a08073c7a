"""Where the time of one decode step of a whole model goes: clocks around its parts, one thread.

Run: `python benchmarks/step.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from occamkv import PackedCache
from occamkv.bench import decode
from occamkv.cli.conditions import conditions
from occamkv.cli.models import load
from occamkv.integrations.transformers import attention
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.model import use_attention
from occamkv.kernels.cpu import library, step

Times = dict[str, float]


@contextmanager
def clocks(times: Times) -> Iterator[None]:
    """Add up the seconds of each part of a step; parts inside others are taken out of them afterwards."""

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                times[name] += time.perf_counter() - start

        return run

    with (
        mock.patch.object(nn.functional, "linear", timed("linear", nn.functional.linear)),
        mock.patch.object(library, "run", timed("native", library.run)),
        mock.patch.object(step.LayerStep, "__call__", timed("stepper", step.LayerStep.__call__)),
        mock.patch.object(attention, "_attend_packed", timed("attention", attention._attend_packed)),
        mock.patch.object(PackedLayer, "update", timed("update", PackedLayer.update)),
    ):
        yield


def measure(model: Any, context: int, method: str, steps: int) -> Times:
    """Return the median milliseconds of each part of a step at this context."""
    cache = PackedCache(model, method)
    before = use_attention(model, attention.NAME)
    decode.fill(cache, decode.layer_shapes(model), context, dtype=model.dtype, backend=None)
    token, found = torch.ones(1, 1, dtype=torch.int64), defaultdict(list)
    for index in range(steps + 2):
        times: Times = defaultdict(float)
        with torch.no_grad(), clocks(times):
            start = time.perf_counter()
            model(token, past_key_values=cache, logits_to_keep=1)
            times["step"] = time.perf_counter() - start
        if index >= 2:
            for name, value in parts(times).items():
                found[name].append(1000 * value)
    if before is not None:
        use_attention(model, before)
    return {name: statistics.median(values) for name, values in found.items()}


def parts(times: Times) -> Times:
    """Take inner parts out of outer ones, so that the rows add up to the step."""
    return {
        "step": times["step"],
        "matrix products of the model": times["linear"],
        "native call: rotate, append, attend, pack": times["native"],
        "describing the call to it": times["stepper"] - times["native"],
        "our attention function around that": times["attention"] - times["stepper"],
        "`Cache.update`, with its checks": times["update"],
        "norms, rotary embedding, activations, modules": times["step"]
        - times["linear"]
        - times["attention"]
        - times["update"],
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contexts", default="512,8192")
    parser.add_argument("--method", default="occam")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/step.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load(args.model)
    contexts = [int(context) for context in args.contexts.split(",")]
    rows = {str(context): measure(model, context, args.method, args.steps) for context in contexts}
    for name in next(iter(rows.values())):
        print(f"{name:50s}" + "".join(f"{found[name]:10.3f}" for found in rows.values()))
    result = {
        "schema_version": 1,
        "what": f"ms of a decode step, medians of {args.steps} steps, one thread",
        "model": args.model,
        "layers": model.config.num_hidden_layers,
        "method": args.method,
        "isa": library.isa(),
        **conditions(),
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
