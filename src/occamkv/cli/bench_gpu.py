"""`occamkv bench --device cuda`: what it asks of the benchmarks of GPUs, and when it leaves with an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from occamkv.cli.shell import fail, stages
from occamkv.errors import UnsupportedInput

if TYPE_CHECKING:
    from occamkv.bench import Shape

EXIT_WRONG = 1


def attend_on_gpu(device: str, shapes: Sequence[Shape] | None, **options: Any) -> dict[str, Any]:
    """Return errors, ceilings and times of attention; leave with exit code 1 where an error is too large."""
    from occamkv.bench import gpu_attend, gpu_timing
    from occamkv.bench.gpu_ceilings import measure_ceilings
    from occamkv.bench.gpu_errors import check_errors

    setting = gpu_attend.GpuSetting(_chosen(shapes), **options)
    rig = gpu_timing.gpu_rig(device)
    errors = check_errors(setting.chosen, rig)
    wrong = [
        f"{row['shape']} {row['method']} ({row['backend']}): {row['ours']:.2e}, SDPA {row['sdpa_bf16']:.2e}"
        for row in errors
        if not row["ok"]
    ]
    if wrong:
        limits = f"{errors[0]['limit']:g} or SDPA's own"
        fail(f"attention is wrong, nothing was timed; errors above {limits}: {'; '.join(wrong)}.", EXIT_WRONG)
    ceilings = measure_ceilings(rig)
    with stages() as advance:
        rows, dropped = gpu_attend.bench_gpu_attend(setting, rig, ceilings, progress=advance)
    _check_measured(rows, dropped)
    gpu = gpu_timing.gpu_conditions(rig.device)
    return {"gpu": gpu, "ceilings": ceilings.to_json(), "errors": errors, "rows": rows, "dropped": dropped}


def encode_on_gpu(
    device: str,
    shapes: Sequence[Shape] | None,
    *,
    repetitions: int,
    tokens: int = 2**15,
    methods: Sequence[str] = ("oscar", "occam"),
) -> dict[str, Any]:
    """Return ceilings and times of encoding."""
    from occamkv.bench import gpu_encode, gpu_timing
    from occamkv.bench.gpu_ceilings import measure_ceilings

    rig = gpu_timing.gpu_rig(device)
    ceilings = measure_ceilings(rig)
    rows = gpu_encode.bench_gpu_encode(_chosen(shapes), methods, rig, ceilings, tokens=tokens, repetitions=repetitions)
    return {"gpu": gpu_timing.gpu_conditions(rig.device), "ceilings": ceilings.to_json(), "rows": rows}


def decode_on_gpu(device: str, model: str | None, **options: Any) -> dict[str, Any]:
    """Return times of whole models, and the largest batches."""
    from occamkv.bench import gpu_timing
    from occamkv.bench.gpu_decode import GpuDecodeSetting, bench_gpu_decode
    from occamkv.cli.models import build_random, random_gpu_models, random_models

    setting = GpuDecodeSetting(**options)
    made = random_gpu_models() | random_models()
    name = next(iter(made)) if model is None else model
    if name not in made:
        raise UnsupportedInput(f"there is no random model {name!r}; allowed on a GPU: {', '.join(made)}.")
    rig = gpu_timing.gpu_rig(device)
    built = build_random(name, dtype="bfloat16", seed=0, device=device)
    with stages() as advance:
        found = bench_gpu_decode(built, setting, rig, progress=advance)
    _check_measured(found["rows"], found["dropped"])
    return {"gpu": gpu_timing.gpu_conditions(rig.device), "model": name, **found}


def _check_measured(rows: Sequence[Any], dropped: Sequence[str]) -> None:
    if not rows:
        raise UnsupportedInput(f"nothing was measured: {'; '.join(dropped)}. Give fewer tokens or more seconds.")


def check_left_out(dropped: Sequence[str]) -> None:
    """End with exit code 1 where a case failed, though others were measured and written."""
    from occamkv.bench.gpu_timing import FAILED

    failed = [case for case in dropped if f" {FAILED} " in case]
    if failed:
        fail(f"{len(failed)} cases failed: {'; '.join(failed)}.", EXIT_WRONG)


def _chosen(shapes: Sequence[Shape] | None) -> Sequence[Shape]:
    """Return the shapes that were given, or those of this benchmark."""
    from occamkv.bench import Shape
    from occamkv.bench.gpu_attend import SHAPES

    return [Shape(name, *map(int, name.split("/"))) for name in SHAPES] if shapes is None else shapes
