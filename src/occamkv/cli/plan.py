"""`occamkv plan`: what weights and cache take, and what fits, from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from occamkv.cli.shell import EXIT_NOTHING_QUANTIZED, check_writable, err, fail, verb, write_json
from occamkv.errors import NothingQuantized, UnsupportedInput
from occamkv.methods import method

if TYPE_CHECKING:
    from occamkv.cache import Plan
    from occamkv.cache.sizes import ModelSizes
    from occamkv.planning.result import Room
    from occamkv.planning.workload import Workload

EXIT_DOES_NOT_FIT = 1

_QUALITY = {"small": "occam_small", "default": "occam", "high": "occam_quality_k3v2_g64"}
_METHODS = ",".join((*reversed(_QUALITY.values()), "oscar"))
_LARGE = 2**28  # bytes that are worth a note
_MOST_BATCH, _MOST_CONTEXT = 2**20, 2**17


@verb("plan")
def plan(
    model: Annotated[
        str, typer.Argument(help="A folder, a config.json, a .gguf file, a bundled model, or a hub id once downloaded.")
    ],
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a sequence, prompt and answer; 128k is 131072. Default: the model's, at most 128k."
        ),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What there is: 24GiB or 24g (2**30), 24GB (10**9).")] = None,
    batch: Annotated[int, typer.Option(min=1, max=_MOST_BATCH, help="Sequences at a time.")] = 1,
    methods: Annotated[
        str | None,
        typer.Option("--method", help=f"Methods, best first; the first that fits is taken. Default: {_METHODS}."),
    ] = None,
    quality: Annotated[
        str | None, typer.Option(help=f"A word instead: {', '.join(f'{w} is {m}' for w, m in _QUALITY.items())}.")
    ] = None,
    use_plan: Annotated[Path | None, typer.Option(help="A plan file instead of methods.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache: bfloat16, float16 or float32.")] = "bfloat16",
    weights: Annotated[str | None, typer.Option(help="Size of the weights, if they are quantized: 4.5GiB.")] = None,
    weights_bits: Annotated[
        int | None, typer.Option(help="Or bits of their matrices: 16, 8 or 4; scales are not counted.")
    ] = None,
    reserve: Annotated[str, typer.Option(help="Room for activations and the runtime.")] = "0B",
    chunk: Annotated[str | None, typer.Option(help="Tokens of the prompt that are read at a time.")] = None,
    source: Annotated[str | None, typer.Option(help="Tokens of the encoder's text, for models that have one.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    plot_file: Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Draw the figure as PNG.")] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", metavar="FILE", help="Write the plan of the method that fits, for `run`.")
    ] = None,
) -> None:
    """Say what weights and KV cache take, with each method, and how long a context fits; no weights are read."""
    from occamkv.planning import Workload
    from occamkv.planning.result import compare
    from occamkv.planning.units import tokens_of

    check_writable(json_file, stdout=True)
    for path in (plot_file, plan_file):
        check_writable(path)
    if plot_file is not None:
        _check_plot(plot_file)
    length, step, text = (
        None if given is None else tokens_of(given, name=name)
        for name, given in (("context", context), ("chunk", chunk), ("source", source))
    )
    names = _names(methods, quality, use_plan)
    room_of = _room_reader(memory, weights, weights_bits, reserve)
    config, sizes, notes = _read(model, dtype)
    load = Workload(length or min(sizes.limit or _MOST_CONTEXT, _MOST_CONTEXT), batch, step, text or 0)
    plans, refused = _plans(config, names, use_plan)
    room = room_of(sizes)
    result = {"model": model, **compare(sizes, plans, load, room)}
    result["notes"] = [*notes, *_notes(sizes, plans, load, stored=weights is None and weights_bits is None)]
    if json_file is not None:
        write_json(result, json_file)
    if json_file != "-":
        from occamkv.cli.plan_tables import show

        show(result)
    if plot_file is not None:
        _draw(f"{Path(model).name}: memory against context", sizes, plans, load, room, plot_file)
    _write_plan(plan_file, result, plans)
    if refused:
        reasons = "; ".join(sorted({kind["reason"] for kind in result["layers"]}))
        fail(f"no layer of this model can be packed: {reasons}. Use it without occamkv.", EXIT_NOTHING_QUANTIZED)
    if room.memory is not None and result["chosen"] is None:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _names(methods: str | None, quality: str | None, use_plan: Path | None) -> list[str]:
    """Return the methods that were asked for, without those that mean the same."""
    if sum(each is not None for each in (methods, quality, use_plan)) > 1:
        raise UnsupportedInput("give one of --method, --quality and --use-plan; each says how the cache is packed.")
    if use_plan is not None:
        return []
    if quality is not None and quality not in _QUALITY:
        raise UnsupportedInput(f"quality is {quality!r}; allowed: {', '.join(_QUALITY)}.")
    given = _QUALITY[quality] if quality is not None else methods or _METHODS
    names = [str(method(name)) for name in given.split(",") if name]
    if not names:
        raise UnsupportedInput(f"method is {methods!r}; allowed: one or more names, for example {_METHODS}.")
    return list(dict.fromkeys(names))


def _room_reader(memory: str | None, weights: str | None, bits: int | None, reserve: str) -> Any:
    """Read sizes before any work is done; return what makes a `Room` of them for a model."""
    from occamkv.planning.result import Room, weight_bytes
    from occamkv.planning.units import bytes_of

    if weights is not None and bits is not None:
        raise UnsupportedInput("give either --weights SIZE or --weights-bits N.")
    given = None if weights is None else bytes_of(weights, name="weights")
    there = None if memory is None else bytes_of(memory, name="memory")
    kept = bytes_of(reserve, name="reserve")
    return lambda sizes: Room(weight_bytes(sizes, bits=bits) if given is None else given, there, kept)


def _read(model: str, dtype: str) -> tuple[Any, ModelSizes, list[str]]:
    """Return configuration and sizes of a model, and what was assumed about it."""
    from occamkv.cli.models import config_of
    from occamkv.integrations.transformers.sizes import read_sizes

    config, notes = config_of(model)
    return config, read_sizes(config, dtype=dtype), notes


def _plans(config: Any, names: list[str], use_plan: Path | None) -> tuple[dict[str, Plan], bool]:
    """Return a plan for each method, `full` first, and whether all others were refused."""
    from occamkv.cache import Plan
    from occamkv.integrations.transformers.plan import check_plan, plan_for

    plans = {"full": plan_for(config, "full")}
    if use_plan is not None:
        given = Plan.load(use_plan)
        check_plan(given, config)
        return plans | {use_plan.name: given}, False
    try:
        return plans | {name: plan_for(config, name) for name in names}, False
    except NothingQuantized:
        return plans, True


def _notes(sizes: ModelSizes, plans: dict[str, Plan], load: Workload, *, stored: bool) -> list[str]:
    """Return what the numbers do not say; `stored` asks how the weights are."""
    from occamkv.planning.estimate import packs, window_overhang
    from occamkv.planning.units import size_text, tokens_text

    notes = []
    if sizes.limit is not None and load.context > sizes.limit:
        notes.append(
            f"{load.context} tokens are more than the {sizes.limit} ({tokens_text(sizes.limit)}) that the model was "
            "made for (max_position_embeddings)"
        )
    if sizes.stored_as is not None and stored:
        notes.append(
            f"the weights are stored quantized ({sizes.stored_as}) and were counted in {sizes.dtype}; "
            "say --weights SIZE if they stay quantized in memory"
        )
    overhang = window_overhang(sizes, load)
    if overhang > _LARGE and load.chunk is None:
        notes.append(
            f"{size_text(overhang)} of what reading takes are windows: transformers cuts them out of tensors of the "
            "whole prompt, which stay until the next step. --chunk 2k counts a prompt read in pieces"
        )
    entries = zip(list(plans.values())[-1].layers, sizes.layers, strict=True)
    if any(packs(entry, layer) and not layer.reads_packed for entry, layer in entries):
        notes.append(
            "this model changes K or V between cache and attention: its packed layers are read dequantized, one layer "
            "at a time, and pack only with the next step"
        )
    return notes


def _check_plot(path: str) -> None:
    from occamkv.drawing import need_matplotlib

    if not path.endswith(".png"):
        raise UnsupportedInput(f"the plot file is {path!r}; allowed: a name that ends with .png.")
    need_matplotlib("--plot")


def _draw(title: str, sizes: ModelSizes, plans: dict[str, Plan], load: Workload, room: Room, path: str) -> None:
    from occamkv.planning.plots import draw

    draw(title, sizes, plans, load, room, path)


def _write_plan(path: str | None, result: dict[str, Any], plans: dict[str, Plan]) -> None:
    """Write the plan of the method that was chosen; without a memory, of the first one that was asked for."""
    if path is None:
        return
    asked = [name for name in plans if name != "full"]
    name = result["chosen"] if result["memory_bytes"] is not None else next(iter(asked), None)
    if name is None:
        err.print(f"no plan was written to {path}: nothing fits, or nothing can be packed", markup=False)
        return
    write_json(plans[name].to_json(), path)
    err.print(f"plan of {name} written to {path}; `occamkv run --plan` takes it", markup=False, highlight=False)
