"""`occamkv analyze`: token norms, attention sinks, and whether to rotate, layer by layer; with a plan that says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from occamkv.cli.analyze_tables import show
from occamkv.cli.shell import check_writable, stages, verb, write_json, write_text
from occamkv.errors import NothingQuantized, UnsupportedInput, UnsupportedModel
from occamkv.methods import DEFAULT_METHOD, method

if TYPE_CHECKING:
    from occamkv.analysis.trace import Trace
    from occamkv.cache import Plan
    from occamkv.evals.texts import Text


_TOKENS = 2048


@dataclass(frozen=True)
class _Seen:
    """What is to be analyzed: a trace, the plan without advice, and where both come from.

    `refused` is the error of a model of which no layer can be packed.
    """

    trace: Trace
    plan: Plan
    refused: NothingQuantized | None
    about: dict[str, Any]


@verb("analyze")
def analyze_model(
    model: Annotated[
        str, typer.Argument(help="A folder, a .gguf file, a hub id, or a bundled model (`occamkv doctor` lists them).")
    ],
    text: Annotated[Path | None, typer.Option(help="A text to read. Default: Python's help topics.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=256, help=f"How much of it; a shorter text is read whole. Default: {_TOKENS}.", show_default=False
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of layers, such as 0,5. Default: all.")] = None,
    method_name: Annotated[str, typer.Option("--method", help="What the advice builds on.")] = DEFAULT_METHOD,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16), float32, bfloat16 or float16.")] = "auto",
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the advised plan, for `occamkv run --plan`.")] = None,
    html_file: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A trace instead of a text; of the model, the configuration alone is read.")
    ] = None,
    save_trace: Annotated[Path | None, typer.Option(help="Write what attention saw, for --trace.")] = None,
    compare: Annotated[
        list[Path] | None, typer.Option(help="Also show what --json wrote of another run; may be given again.")
    ] = None,
) -> None:
    """Tell where a model's attention sinks are, what its keys look like, and what a packed cache should do about it."""
    from occamkv.analysis.measure import analyze
    from occamkv.cli.conditions import conditions

    check_writable(json_file, stdout=True)
    for path in (html_file, plan, save_trace):
        check_writable(path)
    others, base = _others(compare or [], html_file), _method(method_name)
    with stages() as advance:
        if trace is not None:
            _alone(text=text, tokens=tokens, layers=layers, save_trace=save_trace)
            seen = _from_trace(model, trace, base)
        else:
            read = partial(_from_text, model, text, base, tokens=tokens, layers=_numbers(layers), spill=save_trace)
            seen = read(device=device, dtype=dtype, progress=partial(advance, "reading the text"))
        found = analyze(seen.trace, seen.plan, progress=partial(advance, "measuring layers"))
    result = {
        "schema_version": 1,
        "kind": "analysis",
        **conditions(device),
        "model": model,
        **seen.about,
        **found.to_json(),
    }
    if plan is not None and seen.refused is None:
        write_json(found.plan.to_json(), plan)
    if json_file is not None:
        write_json(result, json_file)
    if html_file is not None:
        from occamkv.analysis.page import page

        write_text(page([result, *others]), html_file)
    if json_file != "-":
        show(result)
    if seen.refused is not None:
        raise seen.refused


def _from_text(
    model: str,
    text: Path | None,
    base: Any,
    *,
    tokens: int | None,
    layers: list[int] | None,
    spill: Path | None,
    device: str,
    dtype: str,
    progress: Any,
) -> _Seen:
    """Let the model read a text, and record what its attention sees."""
    from occamkv.analysis.trace import Selection, record
    from occamkv.cli.models import check_tokens, load
    from occamkv.evals.texts import read_text

    read = read_text(text)
    loaded, tokenizer = load(model, device=device, dtype=dtype)
    plan, refused = _plan(loaded.config, base)
    ids, bos = _ids(read, tokenizer, _count(loaded, tokens))
    check_tokens(loaded, ids)
    progress(0, 1)
    keep = Selection(layers=layers, hidden=True, received=True)
    try:
        trace = record(loaded, ids, selection=keep, tokenizer=tokenizer, spill=spill)
    except UnsupportedModel as error:
        raise refused or error from error
    progress(1, 1)
    return _Seen(trace, plan, refused, {"text": {"name": read.name, "sha256": read.sha256}, "bos": bos})


def _from_trace(model: str, file: Path, base: Any) -> _Seen:
    """Read a trace; its model's configuration says what can be packed, its weights are not needed."""
    from occamkv.analysis.trace import Trace
    from occamkv.cli.models import config_of

    trace = Trace.load(file)
    config, _ = config_of(model)
    trace.check_model(config)
    ids = json.dumps(trace.ids[0].tolist(), separators=(",", ":"))
    told = f"The trace begins with {trace.texts[0]!r}." if trace.texts else ""
    about = {
        "text": {"name": file.name, "sha256": sha256(ids.encode()).hexdigest()},
        "bos": {"added": None, "token": None, "told": told},
    }
    return _Seen(trace, *_plan(config, base), about)


def _plan(config: Any, base: Any) -> tuple[Plan, NothingQuantized | None]:
    """Return the plan without advice; where nothing can be packed that of `full`, and the error."""
    from occamkv.integrations.transformers import plan_for

    try:
        return plan_for(config, base), None
    except NothingQuantized as error:
        return plan_for(config, "full"), error


def _alone(**given: Any) -> None:
    """Refuse options that a trace has decided already."""
    named = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if named:
        raise UnsupportedInput(f"{', '.join(named)} and --trace were given; a trace is read as it is. Leave one out.")


def _method(name: str) -> Any:
    chosen = method(name)
    if chosen.format is None or chosen.budget is not None:
        raise UnsupportedInput(
            f"advice cannot build on {name!r}, which {'packs nothing' if chosen.format is None else 'chooses itself'}; "
            "allowed: a method that says its bits, for example occam or oscar."
        )
    return chosen


def _others(files: list[Path], html_file: str | None) -> list[Any]:
    """Read analyses to compare with; refuses what no page can show before a model is loaded."""
    if html_file is None:
        if files:
            raise UnsupportedInput("--compare shows analyses side by side on the page; give --html FILE, too.")
        return []
    from occamkv.drawing import need_matplotlib

    need_matplotlib("the page")
    return [_read(path) for path in files]


def _read(path: Path) -> Any:
    from occamkv.analysis.page import check

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnsupportedInput(f"cannot read the analysis {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise UnsupportedInput(
            f"the analysis {str(path)!r} is no JSON ({error}); allowed: a file that `occamkv analyze --json` wrote."
        ) from error
    check(data)
    return data


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UnsupportedInput(
            f"layers are {text!r}; allowed: numbers separated by commas, for example 0,5."
        ) from error


def _count(model: Any, tokens: int | None) -> int:
    """Return how many tokens to read; refuses more than the model was made for."""
    from occamkv.integrations.transformers.model import text_config

    longest = getattr(text_config(model.config), "max_position_embeddings", None) or max(_TOKENS, tokens or 0)
    if tokens is not None and tokens > longest:
        raise UnsupportedInput(f"{tokens} tokens are to be read; allowed: {longest}, which this model was made for.")
    return tokens or min(_TOKENS, longest)


def _ids(text: Text, tokenizer: Any, tokens: int) -> tuple[Any, dict[str, Any]]:
    """Return at most so many token ids `[1, T]`, with what the tokenizer puts before a text, and what that was."""
    import torch

    head = tokenizer("", add_special_tokens=True).input_ids
    body = tokenizer(text.text, add_special_tokens=False).input_ids
    ids = torch.tensor([(head + body)[:tokens]], dtype=torch.int64)
    token, added = tokenizer.bos_token, bool(head) and tokenizer.bos_token_id in head
    if added:
        told = f"{token!r} was put before the text, as this tokenizer does; without it some models lose their sink."
    elif token is not None:
        told = f"This tokenizer has {token!r} but does not put it before a text, so nothing was added."
    else:
        told = "This tokenizer has no token for the beginning of a text, so nothing was added."
    return ids, {"added": added, "token": token, "told": told}
