"""`occamkv bench`: how long attention, encoding and decoding take, against what torch and transformers offer."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from occamkv.cli.bench_tables import show
from occamkv.cli.shell import app, check_writable, stages, verb, write_json
from occamkv.drawing import need_matplotlib
from occamkv.errors import UnsupportedInput

if TYPE_CHECKING:
    from occamkv.bench import Setting, Shape

_DTYPES = ("bfloat16", "float32")
_RANDOM_SEED = 0

group = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(group, name="bench")

Contexts = Annotated[
    str | None,
    typer.Option(help="Tokens that are attended to, such as 4k,16k; up to 128k. On a GPU in order of value."),
]
Methods = Annotated[
    str | None, typer.Option("--method", help="Method names, separated by commas. Default: occam; GPU: oscar,occam.")
]
Threads = Annotated[str, typer.Option(help="Numbers of threads, separated by commas, or all.")]
Repetitions = Annotated[int, typer.Option(help="Turns of each contestant, 5 or more; slow ones have 5.")]
Backend = Annotated[str | None, typer.Option(help="Default: the one that the cache would take.")]
Isa = Annotated[str | None, typer.Option(help="Instruction set of the CPU backend; `occamkv doctor` lists them.")]
Shapes = Annotated[
    str | None, typer.Option(help="Names, or query heads/KV heads/head_dim such as 32/8/128. Default: all names.")
]
Device = Annotated[str, typer.Option(help="cpu, or cuda for the benchmark of GPUs.")]
BudgetSeconds = Annotated[
    float | None, typer.Option(help="On a GPU: what is not begun by then is left out, and named.")
]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")]
PlotFile = Annotated[str | None, typer.Option("--plot", metavar="FILE.png", help="Draw it against the context.")]


@verb("attend", group=group)
def attend(
    device: Device = "cpu",
    shapes: Shapes = None,
    contexts: Contexts = None,
    methods: Methods = None,
    batches: Annotated[str | None, typer.Option(help="On a GPU: sequences at once, in order of value.")] = None,
    budget_seconds: BudgetSeconds = None,
    queries: Annotated[int, typer.Option(help="Newest tokens that attend at once, up to 128.")] = 1,
    threads: Threads = "1",
    repetitions: Repetitions = 9,
    backend: Backend = None,
    isa: Isa = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """One attention call on packed tokens, against six ways to do it with torch in full precision."""
    report = _Report("attend", json_file, plot_file, device)
    if device != "cpu":
        _refuse("--device cuda", threads=threads != "1", queries=queries != 1, backend=backend, isa=isa)
        from occamkv.cli.bench_gpu import attend_on_gpu

        options = _given(contexts=contexts, batches=batches, methods=methods, budget_seconds=budget_seconds)
        found = attend_on_gpu(device, None if shapes is None else _shapes(shapes), repetitions=repetitions, **options)
        report.finish(found, what="ms of one attention call of one layer")
        return
    _refuse("--device cpu", batches=batches, budget_seconds=budget_seconds)
    _set_isa(isa)
    from occamkv.bench import bench_attend

    counts = _tokens("contexts", "4k,16k,64k" if contexts is None else contexts)
    setting = _setting(methods, threads, repetitions, backend, contexts=counts)
    with stages() as advance:
        rows = bench_attend(_shapes(shapes), setting, queries=queries, progress=advance)
    report.finish({"rows": rows}, what="ms of one attention call of one layer")


@verb("encode", group=group)
def encode(
    device: Device = "cpu",
    shapes: Shapes = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens encoded in a call, a multiple of 128. Default: 1024; GPU: 32768.")
    ] = None,
    methods: Methods = None,
    threads: Threads = "1",
    repetitions: Repetitions = 5,
    backend: Backend = None,
    isa: Isa = None,
    json_file: JsonFile = None,
) -> None:
    """Encode new tokens of one layer, against the reference backend."""
    report = _Report("encode", json_file, None, device)
    if device != "cpu":
        _refuse("--device cuda", threads=threads != "1", backend=backend, isa=isa)
        from occamkv.cli.bench_gpu import encode_on_gpu

        options = _given(tokens=tokens, methods=methods)
        found = encode_on_gpu(device, None if shapes is None else _shapes(shapes), repetitions=repetitions, **options)
        report.finish(found, what="ms to encode tokens of one layer, from model space to records")
        return
    _set_isa(isa)
    from occamkv.bench import bench_encode

    setting = _setting(methods, threads, repetitions, backend)
    with stages() as advance:
        rows = bench_encode(_shapes(shapes), setting, tokens=1024 if tokens is None else tokens, progress=advance)
    report.finish({"rows": rows}, what="ms to encode tokens of one layer, from model space to records")


@verb("decode", group=group)
def decode(
    models: Annotated[
        str | None,
        typer.Option("--model", help="Models as in `occamkv run`, or one with random weights. Default: both kinds."),
    ] = None,
    device: Device = "cpu",
    contexts: Contexts = None,
    methods: Methods = None,
    batches: Annotated[str | None, typer.Option(help="On a GPU: sequences at once, besides 1.")] = None,
    batch_contexts: Annotated[str | None, typer.Option(help="On a GPU: tokens of each of those sequences.")] = None,
    budget_seconds: BudgetSeconds = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Dtypes of the model: bfloat16, float32. GPU: bfloat16 alone.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Tokens decoded in a turn. Default: 32; GPU: 8.")] = None,
    prefill_contexts: Annotated[
        str | None,
        typer.Option(help="Prompts that the first model reads; empty for none. Default: 8k; GPU: 32k."),
    ] = None,
    prefill_repetitions: Annotated[int, typer.Option(help="How often each; on a GPU 3 times.")] = 3,
    threads: Threads = "1",
    repetitions: Repetitions = 5,
    backend: Backend = None,
    isa: Isa = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Greedy decoding and prefill of whole models, against transformers' own cache with SDPA."""
    report = _Report("decode", json_file, plot_file, device)
    if device != "cpu":
        given = {"dtypes": dtypes, "prefill_repetitions": prefill_repetitions != 3, "threads": threads != "1"}
        _refuse("--device cuda", **given, backend=backend, isa=isa)
        from occamkv.cli.bench_gpu import decode_on_gpu

        options = _given(contexts=contexts, batches=batches, batch_contexts=batch_contexts, methods=methods)
        options |= _given(prefill_contexts=prefill_contexts, steps=steps, budget_seconds=budget_seconds)
        result = decode_on_gpu(device, models, repetitions=repetitions, **options)
        report.finish(result, what="ms of one captured decoding step")
        return
    _refuse("--device cpu", batches=batches, batch_contexts=batch_contexts, budget_seconds=budget_seconds)
    _set_isa(isa)
    from occamkv.bench import bench_decode
    from occamkv.bench.decode import Prefill

    counts = _tokens("contexts", "512,2k,8k,32k" if contexts is None else contexts)
    setting = _setting(methods, threads, repetitions, backend, contexts=counts)
    read = _tokens("prefill contexts", "8k" if prefill_contexts is None else prefill_contexts)
    loaders = _loaders(models, ",".join(_DTYPES) if dtypes is None else dtypes)
    with stages() as advance:
        found = bench_decode(
            loaders,
            setting,
            steps=32 if steps is None else steps,
            prefill=Prefill(read, prefill_repetitions),
            progress=advance,
        )
    report.finish({"rows": found.rows, "prefill": found.prefill}, what="ms of one greedy decoding step")


def _refuse(device: str, **options: object) -> None:
    """Refuse options that mean nothing on a device, rather than ignore them."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False)]
    if given:
        raise UnsupportedInput(f"{', '.join(given)} cannot be given with {device}; leave it out.")


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given, lists read."""
    numbers = ("contexts", "batches", "batch_contexts", "prefill_contexts")
    read = {name: value for name, value in options.items() if value is not None}
    for name, value in read.items():
        if name in numbers:
            read[name] = _tokens(name.replace("_", " "), value)
        elif name == "methods":
            read[name] = _names(value)
    return read


class _Report:
    """Where a result goes; refuses a bad place before anything is measured, and notes the load of the machine."""

    def __init__(self, kind: str, json_file: str | None, plot_file: str | None, device: str) -> None:
        from occamkv.cli.conditions import load_average

        check_writable(json_file, stdout=True)
        check_writable(plot_file)
        if plot_file is not None:
            _need_plots(plot_file)
        self.kind, self.json_file, self.plot_file = kind if device == "cpu" else f"gpu-{kind}", json_file, plot_file
        self.device = device
        self.load_start = load_average()

    def finish(self, found: dict[str, Any], *, what: str) -> None:
        """Write and show a result."""
        from occamkv.bench.result import SCHEMA_VERSION, check
        from occamkv.cli.conditions import conditions, cpu_conditions

        given = conditions(self.device)
        del given["threads"]  # each row has its own
        if self.device == "cpu":
            given["cpu"] = cpu_conditions() | {"isa": _isa(), "load_start": self.load_start}
        result = {"schema_version": SCHEMA_VERSION, "kind": self.kind, "what": what, **given, **found}
        check(result)
        if self.json_file is not None:
            write_json(result, self.json_file)
        if self.plot_file is not None:
            from occamkv.bench.plots import draw

            draw(result, self.plot_file)
        if self.json_file != "-":
            show(result)
        if self.device != "cpu":
            from occamkv.cli.bench_gpu import check_left_out

            check_left_out(result.get("dropped", []))


def _isa() -> str | None:
    """Return the instruction set of the native kernels, or None without them."""
    from occamkv.kernels.cpu import library

    return None if library.unavailable() else library.isa()


def _need_plots(path: str) -> None:
    if not path.endswith(".png"):
        raise UnsupportedInput(f"the plot file is {path!r}; allowed: a name that ends with .png.")
    need_matplotlib("--plot")


def _set_isa(isa: str | None) -> None:
    """Take another instruction set than the best one."""
    from occamkv.kernels.cpu import library

    if isa is not None:
        library.select(isa)


def _setting(
    methods: str | None, threads: str, repetitions: int, backend: str | None, **contexts: tuple[int, ...]
) -> Setting:
    from occamkv.bench import Setting

    counts = (os.cpu_count() or 1,) if threads == "all" else _tokens("threads", threads)
    return Setting(
        methods=_names("occam" if methods is None else methods),
        threads=counts,
        repetitions=repetitions,
        backend=backend,
        **contexts,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _tokens(name: str, text: str) -> tuple[int, ...]:
    """Read a list of whole numbers, of which some may be in units of 1024 (4k)."""
    try:
        return tuple(int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in _names(text.lower()))
    except ValueError as error:
        raise UnsupportedInput(
            f"{name} are {text!r}; allowed: whole numbers separated by commas, for example 512,4k."
        ) from error


def _shapes(text: str | None) -> list[Shape]:
    from occamkv.bench import Shape
    from occamkv.cli.models import attention_shapes

    known = attention_shapes()
    found = []
    for name in _names(text) if text is not None else known:
        parts = name.split("/")
        if name not in known and not (len(parts) == 3 and all(part.isdecimal() for part in parts)):
            raise UnsupportedInput(
                f"unknown shape {name!r}; allowed: {', '.join(known)}, or query heads/KV heads/head_dim, for example "
                "32/8/128."
            )
        found.append(Shape(name, *(known[name] if name in known else map(int, parts))))
    return found


def _loaders(models: str | None, dtypes: str) -> dict[str, dict[str, Any]]:
    """Return how to load each model in each dtype; refuses what does not exist before anything is measured."""
    from occamkv.cli.models import build_random, find, load, packaged_models, random_models

    wanted = _names(dtypes)
    if not wanted or len(set(wanted)) < len(wanted) or set(wanted) - set(_DTYPES):
        raise UnsupportedInput(f"dtypes are {dtypes!r}; allowed: {', '.join(_DTYPES)}, each once.")
    made = random_models()
    names = _names(models) if models is not None else (next(iter(packaged_models())), *made)
    if not names:
        raise UnsupportedInput(f"models are {models!r}; allowed: one or more, for example {', '.join(made)}.")

    def loaded(name: str, dtype: str) -> Any:
        return build_random(name, dtype=dtype, seed=_RANDOM_SEED) if name in made else load(name, dtype=dtype)[0]

    for name in names:
        if name not in made:
            find(name)
    return {name: {dtype: partial(loaded, name, dtype) for dtype in wanted} for name in names}
