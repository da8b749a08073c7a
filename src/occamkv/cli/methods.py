"""`occamkv methods`: what can be written after --method."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from occamkv.cli.shell import out, verb, write_json
from occamkv.methods import METHOD_NAMES, method


@verb("methods")
def methods(
    kv_heads: Annotated[int, typer.Option(help="KV heads of the model, for the bits.", min=1)] = 8,
    head_dim: Annotated[int, typer.Option(help="Head dimension of the model, for the bits.", min=8)] = 128,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
) -> None:
    """List the methods, what each does to K and V, and the bits a value really takes."""
    rows = [_row(name, kv_heads, head_dim) for name in METHOD_NAMES]
    if json_file is not None:
        write_json({"schema_version": 1, "kv_heads": kv_heads, "head_dim": head_dim, "rows": rows}, json_file)
        return
    table = Table(title=f"bits per value at {kv_heads} KV heads x {head_dim}, everything counted")
    for column in ("method", "bits", "K", "V", "grid", "flush", "source"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    out.print(table)
    out.print(
        "a name takes parts: name[_kXvY][_gK[xV]][_m8|_m16][_block|_roll], for example oscar_k3v2_g64_roll; "
        "a method with a budget takes that of auto_b2.5: at most 2.5 bits per value on average",
        markup=False,
    )


def _row(name: str, kv_heads: int, head_dim: int) -> dict[str, Any]:
    chosen = method(name)
    bits = chosen.bits_per_value(kv_heads=kv_heads, head_dim=head_dim)
    if chosen.format is None:
        return {
            "method": name,
            "bits": bits,
            "k": "as it is",
            "v": "as it is",
            "grid": "",
            "flush": "",
            "source": chosen.source,
        }
    form = chosen.format
    k_group = "tokens, per channel" if form.k_axis == "channel" else "channels, per token"
    k = [f"{form.k_bits} bits", f"{min(form.k_group, head_dim) if form.k_axis == 'token' else form.k_group} {k_group}"]
    v = [f"{form.v_bits} bits", f"{min(form.v_group, head_dim)} channels, per token"]
    if chosen.budget is not None:
        bits = float(chosen.budget)
        k, v = (["2 to 4 bits, chosen per layer", f"32 or 64 {what}"] for what in (k_group, "channels, per token"))
    k += ["token scale"] * form.token_scale + [chosen.k_rotation] * (chosen.k_rotation != "none")
    v += [chosen.v_rotation] * (chosen.v_rotation != "none")
    return {
        "method": name,
        "bits": bits,
        "k": ", ".join(k),
        "v": ", ".join(v),
        "grid": chosen.grid,
        "flush": chosen.flush,
        "source": chosen.source,
    }
