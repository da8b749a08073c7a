"""The page of `occamkv analyze`: one HTML file without network or scripts, made from the JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from occamkv import html
from occamkv.analysis.tables import Shown, advice_section, layers_section, sinks_section
from occamkv.drawing import dark_colours, need_matplotlib
from occamkv.errors import UnsupportedInput
from occamkv.html import code, facts, note, section, side_by_side, text
from occamkv.schema import NUMBER, check_fields, check_version

_COMMAND = "occamkv analyze"
_SCHEMA = {
    "kind": str,
    "model": str,
    "layers": [{"index": NUMBER, "packs": bool, "query_heads": NUMBER, "kv_heads": NUMBER, "head_dim": NUMBER}],
}
_PARTS = ("headline", "panels", "plan")
_TELLS_APART = ("base_method", "tokens", "text", "date")


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of one analysis, or of several side by side; the same results give the same page.

    Args:
        results: What `occamkv analyze --json` wrote.

    Raises:
        UnsupportedInput: There is none, one is something else or lacks what the page stands on, or matplotlib is not
            installed.
    """
    if not results:
        raise UnsupportedInput("there is no analysis to show; allowed: one or more.")
    for result in results:
        check(result)
    need_matplotlib("the page")
    from occamkv.analysis import figures

    named = [Shown(label, result) for label, result in zip(labels(results), results, strict=True)]
    title = f"Norms, sinks and advice: {', '.join(one.label for one in named)}"
    body = [
        f'<header><h1>{text(title)}</h1><p class="under">{_under(results)}</p></header>',
        _headlines(named),
        figures.first_look(named),
        figures.why_section(named),
        figures.maps_section(named),
        figures.steps_section(named),
        sinks_section(named),
        advice_section(named),
        layers_section(named),
        _plans(named),
        _measured(named),
    ]
    return html.page(title, body, dark=dark_colours())


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each result: the model, and what tells results of one model apart."""
    named = [str(result["model"]) for result in results]
    for key in _TELLS_APART:
        if len(set(named)) == len(named):
            return named
        values = [_short(result.get(key)) for result in results]
        if len(set(values)) > 1:
            named = [f"{name}, {value}" for name, value in zip(named, values, strict=True)]
    return named if len(set(named)) == len(named) else [f"{name} ({i})" for i, name in enumerate(named, 1)]


def _short(value: Any) -> str:
    return str(value.get("name") if isinstance(value, Mapping) else value)


def check(result: Mapping[str, Any]) -> None:
    """Raise `UnsupportedInput` unless a page can be made of this."""
    check_version(result, 1, _COMMAND)
    check_fields(result, _SCHEMA, "result", command=_COMMAND)
    if result["kind"] != "analysis":
        raise UnsupportedInput(f"there is no such page of kind {result['kind']!r}; allowed: analysis.")
    if not result["layers"]:
        raise UnsupportedInput("result.layers is empty; allowed: one or more.")
    for layer in result["layers"]:
        profile = layer.get("profile") or {"positions": []}
        lengths = {name: len(values) for name, values in profile.items() if values is not None}
        if len(set(lengths.values())) > 1:
            raise UnsupportedInput(
                f"the profile of layer {layer['index']} has lists of {lengths}; allowed: one length."
            )


def _under(results: Sequence[Mapping[str, Any]]) -> str:
    told = [(f"{result.get('tokens')} tokens", _short(result.get("text")), result.get("date")) for result in results]
    return "; ".join(dict.fromkeys(" · ".join(text(part) for part in parts if part) for parts in told))


def _headlines(results: Sequence[Shown]) -> str:
    several = len(results) > 1
    parts = []
    for one in results:
        said = "".join(f'<p class="said">{_bold(str(sentence))}</p>' for sentence in one.data.get("headline") or ())
        name = f"<h2>{text(one.label)}</h2>" if several else ""
        packed = f"{len(one.packed)} of {len(one.layers)} layers are packed."
        parts.append(f'<div>{name}{said}<p class="under">{packed}</p></div>')
    return side_by_side(parts, columns=len(parts)) if several else parts[0]


def _bold(sentence: str) -> str:
    """Return a sentence with what stands before its first colon in bold."""
    before, colon, after = sentence.partition(": ")
    return f"<b>{text(before)}:</b> {text(after)}" if colon else f"<b>{text(sentence)}</b>"


def _plans(results: Sequence[Shown]) -> str:
    parts = [
        (f"<h3>{text(one.label)}</h3>" if len(results) > 1 else "")
        + f"<pre><code>{text(_plan(one.data['plan']))}</code></pre>"
        for one in results
        if one.data.get("plan")
    ]
    if not parts:
        return ""
    lead = f"The advice as a plan. Save it as {code('plan.json')}; {code('occamkv run --plan plan.json')} follows it."
    return section("Plan", lead, *parts)


def _plan(plan: Mapping[str, Any]) -> str:
    """Return the JSON with a line for each layer."""
    rows = ",\n  ".join(json.dumps(layer) for layer in plan.get("layers") or ())
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in plan.items() if key != "layers")
    return f'{{\n{head} "layers": [\n  {rows}\n ]\n}}'


def _measured(results: Sequence[Shown]) -> str:
    parts = []
    for one in results:
        data = one.data
        missing = [name for name in _PARTS if not data.get(name)]
        bos, source = data.get("bos") or {}, data.get("text") or {}
        versions, kinds = data.get("versions") or {}, data.get("modality") or {}
        told = {
            "Model": f"{text(data['model'])} ({text(data.get('model_type') or 'type unknown')})",
            "Fingerprint": code(data.get("fingerprint") or "unknown"),
            "Text": f"{text(data.get('tokens') or 'unknown')} tokens of {text(source.get('name') or 'unknown')}, "
            f"SHA-256 {code(source.get('sha256') or 'unknown')}",
            "Kinds of tokens": ", ".join(f"{text(count)} {text(kind)}" for kind, count in kinds.items()) or "unknown",
            "First token": text(bos.get("told") or "unknown"),
            "Base method": code(data.get("base_method") or "unknown"),
            "Machine": text(data.get("machine") or "unknown"),
            "Versions": ", ".join(f"{text(name)} {text(version)}" for name, version in versions.items()) or "unknown",
            "Date": text(data.get("date") or "unknown"),
        }
        head = f"<h3>{text(one.label)}</h3>" if len(results) > 1 else ""
        command = f"<pre><code>{text(data.get('command') or 'command unknown')}</code></pre>"
        left_out = note(f"Not in this result, so not shown: {', '.join(missing)}.") if missing else ""
        parts.append(f"{head}{command}{facts(told)}{left_out}")
    return section(
        "How it was measured", "One pass of the model over the text; what its attention saw was recorded.", *parts
    )
