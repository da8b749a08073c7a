"""`occamkv run`: generate with a real model and show what the packed cache did, and what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from occamkv.cli.shell import check_writable, err, fail, named, out, verb, write_json, write_text
from occamkv.errors import UnsupportedInput
from occamkv.methods import DEFAULT_METHOD

if TYPE_CHECKING:
    from occamkv.cli.generate import Outcome
    from occamkv.integrations.transformers import Verify

_SCORED_TOKENS = 384
_VOID = 1


@verb("run")
def run(
    model: Annotated[
        str, typer.Argument(help="A folder, a .gguf file, a hub id, or a bundled model (`occamkv doctor` lists them).")
    ],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the tokenizer's chat template. Default: if it has one.")
    ] = None,
    method_name: Annotated[
        str | None,
        typer.Option("--method", help=f"See `occamkv methods`. Default: {DEFAULT_METHOD}.", show_default=False),
    ] = None,
    bits: Annotated[float | None, typer.Option(help="Budget of --method auto, in bits per value.")] = None,
    pins: Annotated[
        str | None, typer.Option(help="Tokens kept in full precision: none, first:4, detected, at:0,7,130, ...")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Keep the pins and so many of the newest tokens: endless texts, no more memory.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan file instead of one method for all layers.")] = None,
    min_tokens: Annotated[int, typer.Option(min=0, help="Keep shorter contexts in full precision.")] = 0,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, bfloat16 or float16.")] = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 picks the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**63 - 1)] = 0,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Measure KL against the full cache.")] = True,
    receipt_file: Annotated[
        str | None, typer.Option("--receipt", metavar="FILE", help="Verify the run and write a receipt as JSON.")
    ] = None,
    receipt_page: Annotated[
        str | None, typer.Option("--receipt-html", metavar="FILE", help="Write the receipt as a page.")
    ] = None,
    verify_fraction: Annotated[
        float | None, typer.Option(help="Verify attention on this share of the steps. With a receipt: 1/16.")
    ] = None,
    verify_layers: Annotated[
        int | None, typer.Option(help="Verify so many layers; each costs a full copy of its K and V. Default: 3.")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
) -> None:
    """Generate text with a packed KV cache; then show its size, speed and what it changed."""
    from occamkv.cache import Plan
    from occamkv.cli.generate import Settings, generate

    check_writable(json_file, stdout=True)
    for path in (receipt_file, receipt_page):
        check_writable(path)
    receipt = receipt_file is not None or receipt_page is not None
    if plan is not None and (method_name, bits, pins, window) != (None,) * 4:
        raise UnsupportedInput(
            "give either --plan FILE or --method, --bits, --pins, --window; a plan says all that for each layer."
        )
    chosen = named(method_name or DEFAULT_METHOD, budget=bits, pins=pins, window=window)
    if window is not None and (receipt or verify_fraction is not None or verify_layers is not None):
        raise UnsupportedInput(
            "--window forgets tokens, so full precision is no measure of it. Leave out --window, or --receipt, "
            "--receipt-html and --verify-..."
        )
    text = _prompt(prompt, prompt_file)
    loaded_plan = None if plan is None else Plan.load(plan)
    settings = Settings(
        model=model,
        text=text,
        chat=chat,
        method=chosen,
        plan=loaded_plan,
        min_tokens=min_tokens,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        scored_tokens=_SCORED_TOKENS if check else 0,
        verify=_verify(verify_fraction, verify_layers, receipt=receipt),
        receipt=receipt,
    )
    quiet = json_file == "-"
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
        redirect_stdout=False,  # the text goes to stdout as it is
        redirect_stderr=False,
    ) as progress:
        outcome = generate(settings, progress=progress, stream=None if quiet else sys.stdout)
    if json_file is not None:
        write_json(outcome.to_json(), json_file)
    if outcome.receipt is not None:
        _write_receipt(outcome.receipt, receipt_file, receipt_page)
    if not quiet:
        _show(outcome)
    if outcome.receipt is not None and outcome.receipt["void"]:
        fail(outcome.receipt["verdict"], _VOID)


def _verify(fraction: float | None, layers: int | None, *, receipt: bool) -> Verify | None:
    from occamkv.integrations.transformers import Verify

    asked = {"fraction": fraction, "layers": layers}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return Verify(**given) if given or receipt else None


def _write_receipt(data: dict[str, Any], path: str | None, page_path: str | None) -> None:
    from occamkv.evals.receipt_page import html

    if path is not None:
        write_json(data, path)
    if page_path is not None:
        write_text(html(data), page_path)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UnsupportedInput("give either --prompt TEXT or --prompt-file FILE.")
    try:
        if prompt is not None:
            return prompt.encode("utf-8").decode("utf-8")
        return Path(str(prompt_file)).read_text(encoding="utf-8")
    except OSError as error:
        raise UnsupportedInput(f"cannot read the prompt file {str(prompt_file)!r}: {error.strerror}.") from error
    except UnicodeError as error:
        name = "the prompt" if prompt_file is None else f"the prompt file {str(prompt_file)!r}"
        raise UnsupportedInput(f"{name} is no text; allowed: UTF-8.") from error


def _show(outcome: Outcome) -> None:
    data = outcome.to_json()
    table = Table(title=f"{data['model']} with {data['method']}", show_header=False)
    table.add_column()
    table.add_column()
    for name, value in _lines(data):
        table.add_row(name, value)
    out.print()
    out.print(table)
    out.print(str(outcome.report), highlight=False, soft_wrap=True)
    if not outcome.report.packed_layers:
        out.print("nothing was quantized, as you asked: every layer is 'full'.")
    if outcome.receipt is not None and not outcome.receipt["void"]:
        out.print(f"receipt: {outcome.receipt['verdict']}", highlight=False, soft_wrap=True, markup=False)


def _lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    cache = data["cache"]
    lines = [
        ("tokens", f"{data['prompt_tokens']} prompt + {data['new_tokens']} new"),
        ("prefill", _speed(data, "prefill", ".0f")),
        ("decode", _speed(data, "decode", ".1f")),
        ("bits per value", f"{cache['bits_per_value']:.2f} packed, {cache['bits_with_residual']:.2f} with residual"),
        ("cache, computed", f"{_mib(cache['computed_bytes'])} (full precision {_mib(cache['computed_full_bytes'])})"),
        ("cache, measured", f"{_mib(cache['measured_bytes'])} held by its tensors"),
        _memory(data),
        ("backend", data["backend"] or "none"),
        ("layers", f"{cache['packed_layers']} packed, {cache['full_layers']} not (reasons below)"),
    ]
    fidelity = data["fidelity"]
    if fidelity is None:
        return [*lines, ("fidelity", data["fidelity_skipped"])]
    return [
        *lines,
        (
            "mean KL",
            f"{fidelity['kl_mean']:.4f} nats against the full cache, last {fidelity['positions']} prompt tokens",
        ),
        ("same top token", f"{100 * fidelity['same_top']:.1f} % of those tokens"),
        ("full cache, measured", f"{_mib(cache['measured_full_bytes'])} for the prompt"),
    ]


def _speed(data: dict[str, Any], what: str, form: str) -> str:
    key, full = f"{what}_tokens_per_s", data["full_cache"]
    if data[key] is None:
        return "one token only"
    beside = "" if full is None or full[key] is None else f" (full cache with SDPA {full[key]:{form}})"
    return f"{data[key]:{form}} tokens/s{beside}"


def _memory(data: dict[str, Any]) -> tuple[str, str]:
    gpu = data["gpu_memory"]
    if gpu is None:
        return "process memory", _growth(data["rss_growth_bytes"])
    return "GPU memory", f"{_mib(gpu['peak_bytes'])} at most, {_mib(gpu['before_bytes'])} before generating"


def _growth(nbytes: int | None) -> str:
    if nbytes is None:
        return _mib(None)
    return f"{_mib(abs(nbytes))} {'more' if nbytes >= 0 else 'less'} after generating than before"


def _mib(nbytes: float | None) -> str:
    return "not measured" if nbytes is None else f"{nbytes / 2**20:.2f} MiB"
