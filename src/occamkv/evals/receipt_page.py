"""The receipt as a page: one HTML file without network or scripts, made from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from occamkv.drawing import colour, dark_colours
from occamkv.evals.page import banner, controls_told
from occamkv.evals.receipt import check
from occamkv.evals.receipt_words import methods_of, packed_layers
from occamkv.html import code, facts, mib, note, number, page, percent, section, table, text

_BAR = 150  # pixels of the longest bar


def html(data: Mapping[str, Any]) -> str:
    """Return the page of a receipt; the same receipt gives the same page.

    Raises:
        UnsupportedInput: It is no receipt, or it was edited.
    """
    check(data)
    title = f"Receipt: {data['model']['name']} with a packed KV cache"
    date = data["conditions"].get("date")
    new = data["generated"]["tokens"] if data["generated"] else None
    tokens = f"{data['prompt']['tokens']:,} prompt tokens" + ("" if new is None else f" · {new:,} new")
    under = " · ".join([tokens, *([text(date)] if date else [])])
    body = [
        f'<header><h1>{text(title)}</h1><p class="under">{under}</p></header>',
        banner("This receipt is void: its figures say nothing about the cache.", data),
        "" if data["void"] else f'<p class="verdict">{text(data["verdict"])}</p>',
        _glance(data),
        _live(data),
        _layers(data),
        _made(data),
    ]
    return page(title, body, dark=dark_colours())


def _glance(data: Mapping[str, Any]) -> str:
    found, size, packed = data["fidelity"], data["bytes"], packed_layers(data)
    ratio = f"{size['full'] / size['cache']:.1f}\N{MULTIPLICATION SIGN} smaller" if size["cache"] else ""
    lead = "Bytes are those held by the tensors of the live cache, residual and pins included."
    heads = ["Method", number("Cache", "against full")]
    cells = [
        code(methods_of(packed)) if packed else "nothing packed",
        number(mib(size["cache"]), f"{mib(size['full'])}, {ratio}"),
    ]
    if found is None:
        return section(
            "The whole model", lead, table(heads, [cells]), note(f"No second pass: {text(data['fidelity_skipped'])}.")
        )
    lead += (
        f" The other figures come from a second pass over the prompt, packed and full side by side, and count its last "
        f"{found['positions']:,} tokens. KL is KL(full ‖ packed) of the next token."
    )
    change = f"{found['perplexity'] - found['perplexity_full']:+.2f}"
    heads += ["Same top token", number("Mean KL, nats", "99th percentile"), number("Perplexity", "change")]
    cells += [
        percent(found["same_top"]),
        number(f"{found['kl_mean']:.4f}", f"{found['kl_p99']:.4f}"),
        number(f"{found['perplexity']:.2f}", change),
    ]
    return section("The whole model", lead, table(heads, [cells]))


def _live(data: Mapping[str, Any]) -> str:
    """Return what the shadows saw, layer by layer."""
    lead = (
        "A few layers also kept K and V in full precision. On sampled steps that read packed tokens, attention was "
        "computed on both. The error is the norm of the difference of the two attention outputs over that of the full "
        "one. It is each layer's own: K, V and queries come from the model as it ran."
    )
    live = data["live"]
    if live is None:
        return section("The live run", lead, note("This run had no shadows."))
    rows = [(layer, layer["live"]) for layer in data["layers"] if layer["live"]]
    largest = max((seen["error_max"] or 0.0 for _, seen in rows), default=0.0) or 1.0
    cells = [_seen(layer, seen, largest) for layer, seen in rows]
    drawn = '<span style="display:block;text-align:left">Mean, and on to the worst</span>'
    heads = ["Layer", "Steps", "Error, mean", "99th percentile", "At worst", "Cosine", drawn]
    beside = (
        f"Shadowed: {len(rows)} of {live['packed_layers']} packed layers, {mib(data['bytes']['shadows'])} beside the "
        f"cache, which its bytes do not count. Sampled: about 1 in {1 / live['fraction']:.4g} of the steps that read "
        "packed tokens."
    )
    return section("The live run", lead, table(heads, cells), note(beside))


def _seen(layer: Mapping[str, Any], seen: Mapping[str, Any], largest: float) -> list[str]:
    name = number(str(layer["index"]), text(layer["method"]))
    steps = number(f"{seen['steps']:,}", f"of {seen['reads']:,}")
    if not seen["steps"]:
        return [name, steps, "not verified", "", "", "", ""]
    errors = [seen[key] for key in ("error_mean", "error_p99", "error_max")]
    return [name, steps, *map(percent, errors), f"{seen['cosine_mean']:.4f}", _bar(errors[0], errors[2], largest)]


def _bar(mean: float, worst: float, largest: float) -> str:
    """Return a bar as long as the mean, and a thin line on to the worst."""
    solid, rest = (round(_BAR * x / largest, 1) for x in (mean, worst - mean))
    return (
        f'<span style="display:flex;align-items:center;width:{_BAR}px" aria-hidden="true">'
        f'<i style="width:{solid}px;height:10px;background:{colour(0)}"></i>'
        f'<i style="width:{rest}px;height:2px;background:{colour(0)}"></i></span>'
    )


def _layers(data: Mapping[str, Any]) -> str:
    """Return the table of all layers, those that are alike in one row."""
    runs: list[list[Mapping[str, Any]]] = []
    keys = ("method", "reason", "backend", "bits_per_value", "tokens", "packed_tokens")
    for layer in data["layers"]:
        if runs and all(runs[-1][0][key] == layer[key] for key in keys):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    heads = ["Layers", "Method", "Bits per value", "Tokens packed", "Held", "In full precision", "Backend"]
    size, full = data["bytes"], [index for index, run in enumerate(runs) if run[0]["method"] == "full"]
    computed = "" if size["computed"] is None else f", computed {size['computed']:,}"
    return section(
        "Layers",
        "What each layer holds. Residual and pins are in full precision and are counted.",
        table(heads, [_run(run) for run in runs], quiet=full),
        note(f"Packed layers hold {size['measured']:,} bytes as measured{computed}."),
    )


def _run(run: Sequence[Mapping[str, Any]]) -> list[str]:
    first, last = run[0], run[-1]
    name = str(first["index"]) if len(run) == 1 else f"{first['index']}\N{EN DASH}{last['index']}"
    held = sum(layer[key] for layer in run for key in ("packed_bytes", "residual_bytes", "pin_bytes"))
    bits = first["bits_per_value"]
    return [
        number(name, None if first["reason"] is None else text(first["reason"])),
        code(first["method"]),
        "" if bits is None else f"{bits:.2f}",
        f"{first['packed_tokens']:,} of {first['tokens']:,}",
        mib(held),
        mib(sum(layer["full_bytes"] for layer in run)),
        text(first["backend"] or ""),
    ]


def _made(data: Mapping[str, Any]) -> str:
    model, given, prompt = data["model"], data["conditions"], data["prompt"]
    shape = f"{model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}, {model['dtype']}"
    told = {
        "Model": f"{text(model['name'])} ({text(model['model_type'])}): {text(shape)}",
        "Fingerprint": code(model["fingerprint"]),
        "Prompt": f"{prompt['tokens']:,} tokens, SHA-256 of their numbers {code(prompt['ids_sha256'])}",
    }
    if data["generated"]:
        new = data["generated"]
        told["Generated"] = f"{new['tokens']:,} tokens, SHA-256 of their numbers {code(new['ids_sha256'])}"
    if "machine" in given:
        told["Machine"] = f"{text(given['machine'])}, threads: {given['threads']:,}"
        told["Versions"] = ", ".join(f"{text(name)} {text(version)}" for name, version in given["versions"].items())
    told["SHA-256"] = f"{code(data['sha256'])} of this receipt: a sum against edits, not a signature"
    command = f"<pre><code>{text(given['command'])}</code></pre>" if "command" in given else ""
    return section(
        "How it was made",
        "The hashes tell whether another run read the same prompt and gave the same tokens.",
        command,
        facts(told),
        controls_told(data["controls"]),
    )
