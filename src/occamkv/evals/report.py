"""The report of `occamkv eval`: one HTML file without network or scripts, made from the JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from occamkv.drawing import colour, dark_colours, need_matplotlib
from occamkv.evals.page import FULL, INTERVAL, Entry, decimals, named, span, table
from occamkv.evals.result import check
from occamkv.evals.verdict import overlap, verdict
from occamkv.html import code, facts, mib, note, number, page, percent, section, text


def html(result: Mapping[str, Any]) -> str:
    """Return the page; the same result gives the same page.

    Args:
        result: What `occamkv eval --json` wrote (see `occamkv.evals.result`).

    Raises:
        UnsupportedInput: The result does not fit the schema, or matplotlib is not installed.
    """
    check(result)
    need_matplotlib("the report")
    from occamkv.evals import figures

    ordered = sorted(result["rows"], key=lambda row: (row["method"] == FULL, row["bits_per_value"], row["kl_mean"]))
    entries = [
        Entry(row, index, "var(--muted)" if row["method"] == FULL else colour(index))
        for index, row in enumerate(ordered)
    ]
    parts = {
        "mean KL above 0": figures.bits_section(entries),
        "KL by position": figures.position_section(entries),
        "generated text": figures.generated_section(entries),
        "errors of single layers": figures.layer_section(entries),
        "probes of the context": figures.probe_section(entries),
        "tasks": _tasks(entries),
    }
    missing = [name for name, part in parts.items() if not part]
    title = f"What a packed KV cache costs {result['model']['name']}"
    body = [
        _head(result, title),
        _banner(result),
        f'<p class="verdict">{verdict(result)}</p>',
        _overview(entries),
        *parts.values(),
        note(f"Not in this result, so not shown: {', '.join(missing)}.") if missing else "",
        _measured(result),
    ]
    return page(title, body, dark=dark_colours())


def _head(result: Mapping[str, Any], title: str) -> str:
    protocol = result["protocol"]
    under = (
        f"{text(result['text']['name'])} · {protocol['windows']:,} windows of {protocol['length']:,} tokens · "
        f"{text(result['date'])}"
    )
    return f'<header><h1>{text(title)}</h1><p class="under">{under}</p></header>'


def _banner(result: Mapping[str, Any]) -> str:
    """Return what failed, or nothing."""
    failed = [control for control in result["controls"] if not control["passed"]]
    if not failed and not result["void"]:
        return ""
    what = "This run is void: its numbers say nothing about the methods." if result["void"] else "A control failed."
    told = "".join(f"<li><b>{text(control['name'])}</b>: {text(control['told'])}</li>" for control in failed)
    why = f"<ul>{told}</ul>" if failed else " No control says why."
    return f'<div class="banner" role="alert"><strong>{what}</strong>{why}</div>'


def _overview(entries: Sequence[Entry]) -> str:
    rows = [entry.data for entry in entries]
    best = {key: _best(entries, key, lower=lower) for key, lower in (("kl_mean", True), ("same_top", False))}
    places = [decimals([row[key] for row in rows]) for key in ("kl_mean", "kl_median", "kl_p99")]
    packed = {(row["packed_layers"], row["layers"]) for row in rows if row["method"] != FULL}
    heads = [
        "Method",
        number("Bits per value", "with residual"),
        number("Mean KL, nats", INTERVAL),
        "KL, median",
        "KL, 99th percentile",
        number("Same top token", INTERVAL),
        number("Perplexity", "change"),
        number("Cache", "against full"),
        *(["Layers packed"] if len(packed) > 1 else []),
    ]

    def cells(entry: Entry) -> list[str]:
        row, all_bits = entry.data, entry.data.get("bits_with_residual")
        kl, same = (None if entry.full else row.get(f"{key}_ci") for key in best)
        change = "" if entry.full else f"{row['perplexity'] - row['perplexity_full']:+.2f}"
        shown = [
            named(entry) + (f"<small>{text(row['source'])}</small>" if row.get("source") else ""),
            number(f"{row['bits_per_value']:.2f}", "" if all_bits is None or entry.full else f"{all_bits:.2f}"),
            number(f"{row['kl_mean']:.{places[0]}f}", kl and span(kl, places[0]), best=entry is best["kl_mean"]),
            f"{row['kl_median']:.{places[1]}f}",
            f"{row['kl_p99']:.{places[2]}f}",
            number(
                percent(row["same_top"]), same and span([100 * end for end in same], 1), best=entry is best["same_top"]
            ),
            number(f"{row['perplexity']:.2f}", change),
            number(mib(row["cache_bytes"]), _smaller(row)),
            f"{row['packed_layers']:,} of {row['layers']:,}",
        ]
        return shown[: len(heads)]

    mark = "Bold: the best of its column, where its interval overlaps no other's."
    mark = mark if any(best.values()) else "None is marked as best: intervals overlap or are missing."
    same = "" if len(packed) != 1 else " Every method packs {} of {} layers.".format(*next(iter(packed)))
    return section(
        "Methods",
        "KL is KL(full ‖ packed) of the next token, 0 if the packed cache changes nothing. "
        "Same top token is the share of positions whose most likely token stays.",
        table(heads, [(entry, cells(entry)) for entry in entries]),
        note(
            f"{mark} Bits per value count everything that is stored for a "
            f"packed token; with residual, also the newest tokens, which stay in full precision.{same}"
        ),
    )


def _smaller(row: Mapping[str, Any]) -> str:
    if row["method"] == FULL or not row["cache_bytes"] > 0:
        return ""
    return f"{row['full_bytes'] / row['cache_bytes']:.1f}\N{MULTIPLICATION SIGN} smaller"


def _best(entries: Sequence[Entry], key: str, *, lower: bool) -> Entry | None:
    """Return the best method if its interval overlaps that of no other; None if one has no interval."""
    methods = [entry for entry in entries if not entry.full and math.isfinite(entry.data[key])]
    ends = [entry.data.get(f"{key}_ci") for entry in methods]
    if len(methods) < 2 or None in ends:
        return None
    best = (min if lower else max)(range(len(methods)), key=lambda index: float(methods[index].data[key]))
    apart = all(index == best or not overlap(ends[best] or (), other or ()) for index, other in enumerate(ends))
    return methods[best] if apart else None


def _tasks(entries: Sequence[Entry]) -> str:
    """Return the table of tasks, or nothing if none was measured."""
    names = list(dict.fromkeys(task["task"] for entry in entries for task in entry.data.get("tasks") or ()))
    if not names:
        return ""
    heads = ["Method", "Score", "Questions", "Tokens generated, mean", "Truncated", "Invalid"]
    parts = []
    for name in names:
        found = [(e, task) for e in entries for task in e.data.get("tasks") or () if task["task"] == name]
        rows = [
            (
                entry,
                [
                    named(entry),
                    number(percent(task["score"]), text(task["metric"])),
                    f"{task['count']:,}",
                    f"{task['generated_mean']:.0f}",
                    f"{task['truncated']:,}",
                    f"{task['invalid']:,}",
                ],
            )
            for entry, task in found
        ]
        parts.append(f"<h3>{text(name)}</h3>" + table(heads, rows))
    return section("Tasks", "Answers generated through the packed cache, scored as each task defines it.", *parts)


def _measured(result: Mapping[str, Any]) -> str:
    model, protocol = result["model"], result["protocol"]
    shape = f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}, {model['dtype']}"
    positions = " or ".join(f"{n:,}" for n in sorted({row["positions"] for row in result["rows"]}))
    told = {
        "Model": f"{text(model['name'])} ({text(model['model_type'])}): {text(shape)}",
        "Fingerprint": code(model["fingerprint"]),
        "Text": f"{text(result['text']['name'])}, SHA-256 {code(result['text']['sha256'])}",
        "Protocol": f"{protocol['windows']:,} windows of {protocol['length']:,} tokens from token "
        f"{protocol['first_token']:,} on; positions from {protocol['score_from']:,} of each window are scored, "
        f"{positions} in all",
        "Machine": f"{text(result['machine'])}, {result['threads']:,} threads",
        "Versions": ", ".join(f"{text(name)} {text(version)}" for name, version in result["versions"].items()),
        "Seed": text(result["seed"]),
        "Date": text(result["date"]),
    }
    states = {True: '<span class="passed">✓ passed</span>', False: '<span class="failed">✗ failed</span>'}
    controls = "".join(
        f"<li>{states[control['passed']]} {text(control['name'])}: {text(control['told'])}</li>"
        for control in result["controls"]
    )
    return section(
        "How it was measured",
        "The same tokens go through a packed and a full-precision cache in steps that equal token-by-token decoding.",
        f"<pre><code>{text(result['command'])}</code></pre>",
        facts(told),
        f'<h3>Controls</h3><ul class="controls">{controls}</ul>' if controls else note("No controls were run."),
    )
