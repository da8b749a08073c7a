"""`occamkv eval`: what each method costs on a model and a text, read through the cache, with controls."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from occamkv.cli.shell import check_writable, err, fail, out, stages, verb, write_json, write_text
from occamkv.errors import UnsupportedInput
from occamkv.methods import Method, method

if TYPE_CHECKING:
    from occamkv.evals.tasks import Task

EXIT_VOID = 1
_WIDTH = 120  # of the table in a file
_METHODS = "occam,oscar,kivi,turboquant"


@verb("eval")
def evaluate_model(
    model: Annotated[
        str, typer.Argument(help="A folder, a .gguf file, a hub id, or a bundled model (`occamkv doctor` lists them).")
    ],
    methods: Annotated[str, typer.Option("--method", help="Method names, separated by commas.")] = _METHODS,
    bits: Annotated[float | None, typer.Option(help="Budget of method auto, in bits per value.")] = None,
    quality: Annotated[
        str | None, typer.Option(help="Find the smallest budget of auto for this on the first window: same-top>=95%.")
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(help="With --quality: write the plan that was chosen there.")
    ] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="Also a plan file; may be given again.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text to score. Default: Python's help topics.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 2048,
    first_token: Annotated[int, typer.Option(min=0, help="Where the first window begins.")] = 3000,
    score_from: Annotated[int, typer.Option(min=0, help="First scored position of a window.")] = 512,
    generated: Annotated[int, typer.Option(min=0, help="Tokens generated after each window's beginning.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of that beginning.")] = 1024,
    probes: Annotated[int, typer.Option(min=0, help="Retrieval probes per kind, length and depth.")] = 0,
    probe_lengths: Annotated[str, typer.Option(help="Tokens of their prompts.")] = "768",
    probe_depths: Annotated[str, typer.Option(help="Where the answer stands, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    probe_kinds: Annotated[str, typer.Option(help="Kinds of probes.")] = "needle,multikey,quote",
    gsm8k: Annotated[Path | None, typer.Option(help="GSM8K: a local file in the official format.")] = None,
    shots_file: Annotated[Path | None, typer.Option(help="Solved problems to show, in the same format.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="How many of them.")] = 0,
    longbench: Annotated[Path | None, typer.Option(help="LongBench or LongBench-E: a local folder.")] = None,
    datasets: Annotated[str, typer.Option(help="Its datasets, such as qasper,hotpotqa_e.")] = "",
    items: Annotated[int, typer.Option(min=0, help="Items of each task; 0 for all.")] = 0,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Put probes and tasks into the chat template.")] = False,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of probes and intervals.", min=0, max=2**63 - 1)] = 0,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    html_file: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None,
) -> None:
    """Measure what methods cost: KL, perplexity, generated tokens, probes, tasks. Void runs exit with 1.

    With --json FILE a stopped run goes on where it was when the same command is given again (FILE.journal).
    """
    from occamkv.cli.conditions import conditions
    from occamkv.cli.models import load
    from occamkv.evals.suite import Protocol, evaluate
    from occamkv.evals.texts import read_text
    from occamkv.evals.texts import windows as windows_of

    check_writable(json_file, stdout=True)
    check_writable(html_file)
    if html_file is not None:
        from occamkv.drawing import need_matplotlib
        from occamkv.evals.report import html

        need_matplotlib("the report")
    chosen = _methods(methods, bits)
    share = _wish(quality, chosen, save_plan)
    given = locals()
    simple = {f.name: given[f.name] for f in fields(Protocol) if f.name in given}
    protocol = Protocol(
        **{
            **simple,
            "probe_lengths": _numbers(probe_lengths, int),
            "probe_depths": _numbers(probe_depths, float),
            "probe_kinds": tuple(probe_kinds.split(",")),
            "task_items": items,
        }
    )
    scored = read_text(text)
    tasks = _tasks(gsm8k, shots_file, shots, longbench, datasets)
    loaded, tokenizer = load(model, device=device, dtype=dtype)
    journal = None if json_file in (None, "-") else Path(f"{json_file}.journal")
    with stages() as advance:
        if share is not None:
            cut = windows_of(scored.text, tokenizer, count=1, length=length, first_token=first_token)
            chosen = _tuned(loaded, cut[0], chosen, share, score_from, save_plan, advance)
        plans = _plans(loaded, [str(one) for one in chosen], plan or [])
        found = evaluate(loaded, tokenizer, plans, scored, protocol, tasks=tasks, journal=journal, progress=advance)
    found["model"]["name"] = model
    result = {"schema_version": found.pop("schema_version"), **conditions(device), **found}
    if json_file is not None:
        write_json(result, json_file)
    if html_file is not None:
        write_text(html(result), html_file)
    if json_file != "-":
        _show(result)
    if result["void"]:
        broken = "; ".join(f"{check['name']} ({check['told']})" for check in result["controls"] if not check["passed"])
        fail(f"the run is void, a control failed: {broken}", EXIT_VOID)


def _methods(names: str, bits: float | None) -> list[Method]:
    """Read the list of methods; refuses an unknown one before a model is loaded."""
    chosen = [method(name) for name in names.split(",") if name and name != "full"]
    if bits is None:
        return chosen
    if not any(one.budget for one in chosen):
        raise UnsupportedInput("--bits is the budget of method auto; give it with --method auto.")
    return [one if one.budget is None else one.with_overrides(budget=bits) for one in chosen]


def _wish(quality: str | None, chosen: list[Method], save_plan: Path | None) -> float | None:
    """Return the share of same top tokens that is asked for."""
    if quality is None:
        if save_plan is not None:
            raise UnsupportedInput("--save-plan writes the plan that --quality finds; give both.")
        return None
    from occamkv.evals.dial import wanted_share

    if sum(one.budget is not None for one in chosen) != 1:
        raise UnsupportedInput("--quality sets the budget of method auto; give --method auto, once.")
    check_writable(save_plan)
    return wanted_share(quality)


def _tuned(
    model: Any, ids: Any, chosen: list[Method], share: float, score_from: int, save_plan: Path | None, advance: Any
) -> list[Method]:
    """Give the method with a budget the smallest one that keeps the share; say which."""
    from occamkv.evals.dial import smallest_budget

    index = next(i for i, one in enumerate(chosen) if one.budget is not None)
    bar = partial(advance, "budgets")
    setting = smallest_budget(model, ids, chosen[index], share, score_from=score_from, progress=bar)
    err.print(f"budget {setting.budget}: {100 * setting.same_top:.1f} % same top on the first window", highlight=False)
    if save_plan is not None:
        write_json(setting.plan.to_json(), save_plan)
    return [one if i != index else one.with_overrides(budget=setting.budget) for i, one in enumerate(chosen)]


def _numbers(text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError as error:
        raise UnsupportedInput(f"{text!r} is no list; allowed: numbers separated by commas.") from error


def _plans(model: Any, names: list[str], files: list[Path]) -> dict[str, Any]:
    from occamkv.cache import Plan
    from occamkv.integrations.transformers import plan_for

    plans = {name: plan_for(model.config, name) for name in names}
    plans |= {path.stem: Plan.load(path) for path in files}
    if len(plans) < len(names) + len(files) or not plans or "full" in plans:
        given = ", ".join([*names, *map(str, files)])
        raise UnsupportedInput(
            f"methods and plans are {given!r}; allowed: at least one method or plan beside full, and each name once."
        )
    return plans


def _tasks(
    gsm8k: Path | None, shots_file: Path | None, shots: int, longbench: Path | None, datasets: str
) -> list[Task]:
    from occamkv.evals.gsm8k import load_gsm8k
    from occamkv.evals.longbench import load_longbench

    tasks = [] if gsm8k is None else [load_gsm8k(gsm8k, shots_file=shots_file, shots=shots)]
    names = [name for name in datasets.split(",") if name]
    if (longbench is None) != (not names):
        raise UnsupportedInput("give --longbench FOLDER together with --datasets NAME,NAME.")
    return tasks + [load_longbench(str(longbench), name) for name in names]


def _show(result: dict[str, Any]) -> None:
    protocol = result["protocol"]
    table = Table(
        title=f"{result['model']['name']} on {result['text']['name']}: {protocol['windows']} windows of "
        f"{protocol['length']} tokens, read through the cache"
    )
    cells = [_cells(row) for row in result["rows"]]
    shown = [name for name in cells[0] if any(row[name] for row in cells)]
    for name in shown:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*(row[name] for name in shown))
    wide = out if out.is_terminal else Console(file=out.file, width=_WIDTH)
    wide.print(table)
    for row in result["rows"]:
        for task in row.get("tasks") or []:
            out.print(
                f"{task['task']}, {row['method']}: {task['metric']} {100 * task['score']:.1f} % of {task['count']}, "
                f"{task['invalid']} invalid, {task['truncated']} cut off, {task['generated_mean']:.0f} tokens each",
                markup=False,
            )
    held = sum(check["passed"] for check in result["controls"])
    out.print(f"controls: {held} of {len(result['controls'])} held")


def _cells(row: dict[str, Any]) -> dict[str, str]:
    interval, generated, probes = row.get("kl_mean_ci"), row.get("generated"), row.get("probes")
    return {
        "method": row["method"],
        "bits": f"{row['bits_per_value']:.2f}",
        "KL": f"{row['kl_mean']:.4f}",
        "95 %": f"{interval[0]:.4f}-{interval[1]:.4f}" if interval else "",
        "same top": f"{100 * row['same_top']:.1f} %",
        "ppl": f"{row['perplexity']:.2f}",
        "MiB": f"{row['cache_bytes'] / 2**20:.1f}",
        "agrees": f"{generated['agreement_length_mean']:.0f} of {generated['tokens']}" if generated else "",
        "probes": f"{100 * probes['exact']:.0f} %, {probes['logprob']:.2f}" if probes else "",
    }
