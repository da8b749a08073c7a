"""`occamkv inspect`: what a file of occamkv holds, in a few lines, and whether it is as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from occamkv.cli.shell import fail, out, verb
from occamkv.errors import UnsupportedInput

if TYPE_CHECKING:
    from occamkv.cache import LayerPlan

_BROKEN = 1
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
_RECEIPT = "occamkv receipt"


@verb("inspect")
def inspect(
    file: Annotated[Path, typer.Argument(help="A receipt, a plan, an analysis or a trace.")],
) -> None:
    """Say what a file is. A receipt that was edited or is void ends with 1."""
    for line in _told(file):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _told(file: Path) -> Iterator[str]:
    try:
        content = file.read_bytes() if file.stat().st_size < 2**28 else b""
        with file.open("rb") as opened:
            head = opened.read(_LENGTH_BYTES + 1)
    except OSError as error:
        raise UnsupportedInput(f"cannot read {str(file)!r}: {error.strerror}.") from error
    if head[_LENGTH_BYTES:] == b"{" and int.from_bytes(head[:_LENGTH_BYTES], "little") < file.stat().st_size:
        return _trace(file)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    kinds: dict[str, Callable[[Any], Iterator[str]]] = {_RECEIPT: _receipt, "analysis": _analysis, "plan": _plan}
    kind = _kind(data) if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedInput(
            f"{str(file)!r} is nothing that `inspect` knows; allowed: what `occamkv run --receipt`, "
            "`occamkv analyze --json`, --plan or --save-trace wrote."
        )
    return kinds[kind](data)


def _kind(data: dict[str, Any]) -> Any:
    if "what" in data or "kind" in data:
        return data.get("what") if data.get("what") == _RECEIPT else data.get("kind")
    return "plan" if isinstance(data.get("model"), dict) and "layers" in data else None


def _receipt(data: dict[str, Any]) -> Iterator[str]:
    from occamkv.evals import receipt
    from occamkv.schema import check_version

    check_version(data, receipt.SCHEMA_VERSION, "occamkv run --receipt")
    try:
        receipt.check(data)
    except UnsupportedInput as error:
        fail(str(error), _BROKEN)
    model, made = data["model"], data["conditions"]
    prompt, new = data["prompt"]["tokens"], (data["generated"] or {"tokens": 0})["tokens"]
    yield f"receipt of {model['name']} ({model['model_type']}, fingerprint {model['fingerprint']}), {made.get('date')}"
    yield f"prompt of {prompt:,} tokens, {new:,} generated: {made.get('command')}"
    if data["void"]:
        fail(f"the receipt is as it was written, and void. {data['verdict']} Make a new one.", _BROKEN)
    yield data["verdict"]
    yield "The seal holds: it is as it was written (a sum against edits, not a signature)."


def _plan(data: dict[str, Any]) -> Iterator[str]:
    from occamkv.cache import Plan

    plan = Plan.from_json(data)
    count = f"{plan.packed_layers} of {len(plan.layers)} layers are packed"
    yield f"plan for {plan.model_type or 'a model'} (fingerprint {plan.fingerprint or 'none'}): {count}"
    for _, run in groupby(plan.layers, lambda entry: (entry.method, entry.reason)):
        layers = list(run)
        first, last = layers[0].index, layers[-1].index
        yield f"  {f'layer {first}' if first == last else f'layers {first}-{last}'}: {_entry(layers[0])}"


def _entry(entry: LayerPlan) -> str:
    if not entry.packs:
        return f"full precision ({entry.reason or 'no reason is given'})"
    from occamkv.methods.names import unnamed_overrides

    changes = [f"{name}={value}" for name, value in unnamed_overrides(entry.method).items() if name != "pins"]
    return ", ".join([str(entry.method).rstrip("+"), *changes, f"pins {entry.method.pins}"])


def _analysis(data: dict[str, Any]) -> Iterator[str]:
    from occamkv.analysis.page import check

    check(data)
    text = data.get("text") or {}
    yield f"analysis of {data['model']}: {data.get('tokens')} tokens of {text.get('name')}, {data.get('date')}"
    yield from data.get("headline") or ()


def _trace(file: Path) -> Iterator[str]:
    from occamkv.analysis.trace import Trace

    trace = Trace.load(file)
    count = f"{len(trace.positions)} tokens" + (f" of {len(trace.ids)} sequences" if len(trace.ids) > 1 else "")
    yield f"trace of {trace.model_type or 'a model'} (fingerprint {trace.fingerprint}): {count}"
    yield f"{len(trace.layers)} of {trace.layer_count} layers, with {', '.join(_parts(trace))}"


def _parts(trace: Any) -> Iterator[str]:
    yield "Q, K, V"
    for name in ("hidden", "received", "rows"):
        if all(getattr(layer, name) is not None for layer in trace.layers):
            yield name
