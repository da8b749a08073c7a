"""Write the tables of README.md and CLAIMS.md from the result files; `--check` only compares.

Run: `python benchmarks/tables.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
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


def quality() -> str:
    """Return the table of methods."""
    data = read("quality")
    protocol = data["protocol"]
    lines = [
        "| model | method | bits per value | KL | same top | perplexity | cache at "
        f"{protocol['length']} tokens, packed layers and others |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        size = f"{row['cache_bytes'] / 2**20:.1f} MiB of {row['full_bytes'] / 2**20:.1f}"
        lines.append(
            f"| {row['model']} ({row['packed_layers']} of {row['layers']} layers) | `{row['method']}` | "
            f"{row['bits_per_value']:.2f} | {row['kl_mean']:.4f} | {100 * row['same_top']:.1f} % | "
            f"{row['perplexity']:.2f} | {size} |"
        )
    words = (
        f"KL(full \\|\\| quantized) in nats over {data['rows'][0]['positions']} positions of "
        f"{protocol['windows']} windows of {protocol['length']} tokens of the {data['text']['name']}, "
        "read through the cache; `full` is the control. "
    )
    return "\n".join([*lines, "", words + under(data)])


def memory() -> str:
    """Return the sentence about resident memory."""
    data = read("memory")
    rows = {row["method"]: row for row in data["rows"]}
    full, packed = rows["full"], rows["oscar"]

    def mib(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 2**20:.0f} MiB"

    ratio = full["cache_bytes"] / packed["cache_bytes"]
    return (
        f"**{ratio:.1f}x smaller**: {full['tokens']} tokens of {data['model']} (bfloat16) take "
        f"{mib(full, 'cache_bytes')} in a full cache and {mib(packed, 'cache_bytes')} in a packed one (`oscar`); "
        f"the process grows by {mib(full, 'growth_bytes')} and by {mib(packed, 'growth_bytes')} "
        f"(peak {mib(full, 'peak_growth_bytes')} and {mib(packed, 'peak_growth_bytes')}). " + under(data)
    )


BLOCKS = {"README.md": {"memory": memory, "quality": quality}}


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
