"""Write the tables of the documents from the result files; `--check` only compares.

Run: `python benchmarks/tables.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """Return a result file."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def under(data: dict[str, Any]) -> str:
    """Return the line under a table: command, machine, versions, date."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items() if name != "occamkv")
    return f"`{data['command']}` on {data['machine']}, {versions}, {data['date']}."


def quality(*files: str, only: tuple[str, ...] = ()) -> str:
    """Return the table of methods, or of some of them, from result files of `occamkv eval`."""
    runs = [read(name) for name in files]
    protocol = runs[0]["protocol"]
    lines = [
        "| model | method | bits | KL | 95 % | same top | perplexity | probes | "
        f"cache at {protocol['length']} tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for data in runs:
        for row in data["rows"]:
            if only and row["method"] not in only:
                continue
            interval = "{:.4f}-{:.4f}".format(*row["kl_mean_ci"])
            probes = row.get("probes")
            size = f"{row['cache_bytes'] / 2**20:.1f} MiB of {row['full_bytes'] / 2**20:.1f}"
            asked = f"{100 * probes['exact']:.0f} %, {probes['logprob']:.2f}" if probes else ""
            lines.append(
                f"| {data['model']['name']} ({row['packed_layers']} of {row['layers']} layers) | `{row['method']}` | "
                f"{row['bits_per_value']:.2f} | {row['kl_mean']:.4f} | {interval} | {100 * row['same_top']:.1f} % | "
                f"{row['perplexity']:.2f} | {asked} | {size} |"
            )
    words = (
        f"KL(full \\|\\| packed) in nats over {runs[0]['rows'][0]['positions']} positions of {protocol['windows']} "
        f"windows of {protocol['length']} tokens of {runs[0]['text']['name']}, read through the cache; `full` is the "
        "control."
    )
    if any(row.get("probes") for data in runs for row in data["rows"]):
        asked = runs[0]["rows"][0]["probes"]["count"]
        words += f" Probes: share of {asked} answered exactly, and mean log-probability of the answer."
    return "\n".join([*lines, "", words, *(under(data) for data in runs)])


def by_model(name: str, key: str) -> str:
    """Return a table with one line per `key` and one column of KL per model."""
    data = read(name)
    models = list(dict.fromkeys(row["model"] for row in data["rows"]))
    cells: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        cells.setdefault(row[key], {})[row["model"]] = row
    bits = "bits_per_value" in data["rows"][0]
    lines = [
        f"| {key} | " + " | ".join(f"{'bits, ' if bits else ''}KL, {model}" for model in models) + " |",
        "|---" * (len(models) + 1) + "|",
    ]
    for label, found in cells.items():
        if label == "full":
            continue
        values = [
            (f"{found[model]['bits_per_value']:.2f}, " if bits else "") + f"{found[model]['kl_mean']:.4f}"
            if model in found
            else ""
            for model in models
        ]
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", under(data)])


def memory() -> str:
    """Return the sentence about resident memory."""
    data = read("memory")
    rows = {row["method"]: row for row in data["rows"]}
    full, packed = rows["full"], rows["occam"]

    def mib(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 2**20:.0f} MiB"

    ratio = full["cache_bytes"] / packed["cache_bytes"]
    return (
        f"**{ratio:.1f}x smaller**: {full['tokens']} tokens of {data['model']} (bfloat16) take "
        f"{mib(full, 'cache_bytes')} in a full cache and {mib(packed, 'cache_bytes')} in a packed one (`occam`); "
        f"the process grows by {mib(full, 'growth_bytes')} and by {mib(packed, 'growth_bytes')} "
        f"(peak {mib(full, 'peak_growth_bytes')} and {mib(packed, 'peak_growth_bytes')}). " + under(data)
    )


def measured(make: Callable[[dict[str, Any]], str], name: str) -> str:
    """Return a table of `occamkv bench`, or where it will come from while there is no result file."""
    if not (RESULTS / f"{name}.json").exists():
        return f"Not measured yet: this table will be made from `{name}.json` in the folder of results."
    data = read(name)
    cpu = data["cpu"]
    load = f"Load average {cpu['load_start']:.1f} before and {cpu['load_end']:.1f} after."
    return "\n".join([make(data), "", f"{under(data)} {load}"])


def attend_speed(data: dict[str, Any]) -> str:
    """Return the table of `occamkv bench attend`, errors and crossovers below it."""
    lines = [
        "| shape | context | method | threads | ms | GB/s packed | `enable_gqa` takes | best stock takes | which |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        lines.append(
            f"| {row['shape']} | {row['context']} | `{row['method']}` | {row['threads']} | {row['ours_ms']:.2f} | "
            f"{row['packed_gb_per_s']:.1f} | {row['ratio_enable_gqa']:.1f}x | {row['ratio_best_stock']:.1f}x | "
            f"{row['best_stock']} |"
        )
    errors = [
        f"{row['shape']}, `{row['method']}`: {row['errors']['ours']:.1e} ({row['errors']['sdpa_gqa_bf16']:.1e})"
        for row in data["rows"]
        if row.get("errors")
    ]
    told = f"Relative L2 error against float64 (that of SDPA in bf16): {'; '.join(dict.fromkeys(errors))}."
    return "\n".join([*lines, "", *crossovers(data["rows"], ("shape", "method", "threads")), "", told])


def encode_speed(data: dict[str, Any]) -> str:
    """Return the table of `occamkv bench encode`."""
    lines = ["| shape | method | threads | tokens/s of a layer | reference backend takes |", "|---|---|---|---|---|"]
    for row in data["rows"]:
        lines.append(
            f"| {row['shape']} | `{row['method']}` | {row['threads']} | {row['ours_tokens_per_s']:.0f} | "
            f"{row['ratio_reference']:.1f}x |"
        )
    return "\n".join(lines)


def decode_speed(data: dict[str, Any]) -> str:
    """Return the tables of `occamkv bench decode`: steps, crossovers, prefill."""
    lines = [
        "| model | dtype | context | method | threads | tokens/s | stock, same dtype | x same | x best stock | cache |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        size = f"{row['cache_bytes'] / 2**20:.1f} of {row['stock_bytes'] / 2**20:.1f} MiB"
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {row['context']} | `{row['method']}` | {row['threads']} | "
            f"{1000 / row['ours_ms']:.1f} | {1000 / row['stock_ms']:.1f} | {row['ratio_enable_gqa']:.2f} | "
            f"{row['ratio_best_stock']:.2f} | {size} |"
        )
    lines += ["", *crossovers(data["rows"], ("shape", "dtype", "method", "threads"))]
    if data["prefill"]:
        lines += ["", "| prompt | dtype | method | threads | prefill, s | stock, s |", "|---|---|---|---|---|---|"]
    for row in data["prefill"]:
        lines.append(
            f"| {row['shape']}, {row['context']} tokens | {row['dtype']} | `{row['method']}` | {row['threads']} | "
            f"{row['ours_ms'] / 1000:.2f} | {row['stock_ms'] / 1000:.2f} |"
        )
    return "\n".join(lines)


def crossovers(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    """Return a line for each kind of row: from which context on it is faster than the best stock."""
    from occamkv.bench.result import crossover_text

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = []
    for names, group in groups.items():
        *kind, threads = names
        told = crossover_text([row["context"] for row in group], [row["ratio_best_stock"] for row in group])
        lines.append(f"- {', '.join(kind)}, {threads} thread{'s' if threads > 1 else ''}: {told}.")
    return lines


def speed() -> str:
    """Return the sentence about decoding speed, from `occamkv bench decode`."""
    if not (RESULTS / "bench-decode.json").exists():
        return "Not measured yet."
    data = read("bench-decode")
    wanted = {"shape": "smollm2", "context": 8192, "method": "occam", "threads": 1, "dtype": "bfloat16"}
    (row,) = (row for row in data["rows"] if all(row[key] == value for key, value in wanted.items()))
    best = row["best_stock"].removeprefix("stock_")
    return (
        f"**{row['ratio_best_stock']:.1f}x faster, {row['stock_bytes'] / row['cache_bytes']:.1f}x smaller**: with "
        f"{row['context']} tokens in the cache {row['shape']} decodes {1000 / row['ours_ms']:.0f} tokens/s on one CPU "
        f"core with the packed cache (`{row['method']}`, bfloat16), and "
        f"{1000 / row['ours_ms'] / row['ratio_best_stock']:.0f} with transformers' `DynamicCache` and SDPA (the faster "
        f"of bfloat16 and float32: {best}). {under(data)}"
    )


def step_parts() -> str:
    """Return the table of `benchmarks/step.py`: where the time of a decode step goes."""
    if not (RESULTS / "step.json").exists():
        return "Not measured yet: this table will be made from `step.json` in the folder of results."
    data = read("step")
    contexts = list(data["rows"])
    lines = [
        "| part | " + " | ".join(f"{int(context)} tokens, ms | a layer, us" for context in contexts) + " |",
        "|---" * (1 + 2 * len(contexts)) + "|",
    ]
    for part in data["rows"][contexts[0]]:
        found = [data["rows"][context][part] for context in contexts]
        cells = (f"{ms:.2f} | {1000 * ms / data['layers']:.0f}" for ms in found)
        lines.append(f"| {'**all**' if part == 'step' else part} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{data['model']}, `{data['method']}`, {data['isa']}, {data['what']}. {under(data)}"])


def key_bias() -> str:
    """Return the table of `benchmarks/key_bias.py`: KL of attention rows by length and place of a key bias."""
    data = read("key-bias")
    names = list(data["rows"][0]["kl"])
    lines = ["| bias | in pairs | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for row in data["rows"]:
        values = " | ".join(f"{row['kl'][name]:.2f}" for name in names)
        lines.append(f"| {row['size']:.0f} | {row['where']} | {values} |")
    return "\n".join([*lines, "", f"A made-up model: {data['what']}. {under(data)}"])


def streaming() -> str:
    """Return the table of `benchmarks/streaming.py`: perplexity by how much of a long text was read."""
    data = read("streaming")
    names, rows = list(data["rows"]), list(data["rows"].values())
    parts = (len(rows[0]["perplexity"]) + 7) // 8
    lines = ["| tokens | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for part in range(parts):
        cells = (f"{statistics.geometric_mean(row['perplexity'][8 * part : 8 * part + 8]):.1f}" for row in rows)
        lines.append(f"| {8 * part}k to {8 * part + 8}k | " + " | ".join(cells) + " |")
    lines.append("| cache at the end | " + " | ".join(f"{row['cache_bytes'] / 2**20:.1f} MiB" for row in rows) + " |")
    told = f"{data['model']}, made for {data['trained_tokens']} tokens: {data['what']}, window of {data['window']}."
    return "\n".join([*lines, "", f"{told} {under(data)}"])


SHOWN = (
    *("full", "occam_small", "occam", "occam_quality", "occam_quality_k3v2_g64"),
    *("oscar", "kivi", "turboquant", "turboquant_k3v3"),
)
EVAL = ("eval-smollm2", "eval-gemma3")
WIKITEXT = ("eval-smollm2-wikitext2", "eval-gemma3-wikitext2")
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"speed": speed, "memory": memory, "quality": partial(quality, *EVAL, only=SHOWN)},
    "CLAIMS.md": {"wikitext": partial(quality, *WIKITEXT)},
    "docs/methods.md": {
        "all": partial(quality, *EVAL),
        "balance": partial(by_model, "balance", "source"),
        "ablation": partial(by_model, "ablation", "method"),
        "dial": partial(quality, "dial-smollm2", "dial-gemma3"),
        "key-bias": key_bias,
        "streaming": streaming,
    },
    "docs/performance.md": {
        "attend": partial(measured, attend_speed, "bench-attend"),
        "threads": partial(measured, attend_speed, "bench-attend-threads"),
        "avx2": partial(measured, attend_speed, "bench-attend-avx2"),
        "bits": partial(measured, attend_speed, "bench-attend-bits"),
        "encode": partial(measured, encode_speed, "bench-encode"),
        "decode": partial(measured, decode_speed, "bench-decode"),
        "prefill": partial(measured, decode_speed, "bench-prefill"),
        "step": step_parts,
    },
}


def render(text: str, blocks: dict[str, Any]) -> str:
    """Fill the blocks between `<!-- name:begin -->` and `<!-- name:end -->`."""
    for name, make in blocks.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"no block {name!r}")
        body = make()
        text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def stale(root: Path = ROOT) -> list[str]:
    """Return the files whose tables differ from the result files."""
    texts = {name: (root / name).read_text(encoding="utf-8") for name in BLOCKS}
    return [name for name, text in texts.items() if render(text, BLOCKS[name]) != text]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        old = stale()
        if old:
            sys.exit(f"stale tables in {', '.join(old)}. Run: python benchmarks/tables.py")
        return
    for name, blocks in BLOCKS.items():
        path = ROOT / name
        path.write_text(render(path.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
