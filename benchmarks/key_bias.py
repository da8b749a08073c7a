"""What a bias of the key projection does to each method: KL of attention rows over made-up keys.

Gaussian keys are the worst case of every quantizer, so the first column, without a bias, is the floor; the others tell
what a bias of some length in four slow, middle or fast pairs of channels adds.

Run: `python benchmarks/key_bias.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from occamkv.cli.conditions import conditions
from occamkv.methods import method
from occamkv.ops.rope import KeyBias, Rotary, worth_removing

DIM, TOKENS, QUERIES, BASE = 128, 2048, 64, 1e6
PAIRS = {"slow": range(60, 64), "middle": range(28, 32), "fast": range(4)}
SIZES = (100.0, 300.0, 600.0)
METHODS = ("kivi", "quarot", "turboquant_k2v2", "oscar", "occam")


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/key-bias.json"))
    args = parser.parse_args()
    rows = [row("none", 0.0)] + [row(where, size) for where in PAIRS for size in SIZES]
    for one in rows:
        print(f"{one['where']:7s}{one['size']:6.0f}  " + "  ".join(f"{k} {v:.3f}" for k, v in one["kl"].items()))
    result = {
        "schema_version": 1,
        "what": f"mean KL in nats of {QUERIES} attention rows over {TOKENS} Gaussian keys of {DIM} channels, K packed",
        **conditions(),
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def row(where: str, size: float) -> dict[str, object]:
    """Return the KL of each method with a bias of this length in these pairs."""
    rotary = Rotary.of(BASE ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2)))
    generator = torch.Generator().manual_seed(0)
    plain = 2 * torch.randn(1, 1, TOKENS, DIM, generator=generator)
    q = torch.randn(1, QUERIES, DIM, generator=generator).double()
    vector = torch.zeros(1, DIM)
    for pair in PAIRS.get(where, ()):
        vector[:, [pair, pair + DIM // 2]] = torch.randn(1, 2, generator=generator)
    bias = KeyBias(rotary, size * vector / vector.norm().clamp_min(1e-30))
    k = rotary.turn(plain, torch.arange(TOKENS)) + bias.rows(torch.arange(TOKENS)[None])
    taken = worth_removing(bias, plain[0].var(1), tokens=32)
    kl = {}
    for name in METHODS:
        kl[name] = divergence(name, q, k, None)
    kl["occam, bias kept"] = divergence("occam", q, k, None)
    kl["occam"] = divergence("occam", q, k, taken)
    kl["oscar, bias removed"] = divergence("oscar", q, k, taken)
    return {"where": where, "size": size, "pairs_removed": 0 if taken is None else len(taken.rotary.first), "kl": kl}


def divergence(name: str, q: Tensor, k: Tensor, bias: KeyBias | None) -> float:
    """Return the mean KL of attention rows when K is packed by a method; Gaussian keys need no balance."""
    rotation = {"k_rotation": "hadamard"} if name == "occam" else {}
    form = method(name, **rotation, key_bias="keep" if bias is None else "remove")
    read, _ = form.decode(form.encode(k, k, key_bias=bias))
    full, packed = ((q @ x[0].double().mT * DIM**-0.5).log_softmax(-1) for x in (k, read))
    return float((full.exp() * (full - packed)).sum(-1).mean())


if __name__ == "__main__":
    main()
