"""The golden records: bytes that must never change. `python tests/formats/golden.py --update` writes them anew.

The input is a formula over integers, with values planted on rounding boundaries, so no random generator has a say.
Update only together with a new version of the layout.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from occamkv.formats import Format
from occamkv.formats.records import Records, encode

GOLDEN_FILE = Path(__file__).resolve().parents[1] / "golden" / "records.json"
FULL_HEX_BYTES = 800  # records up to this size are kept whole


class Case(NamedTuple):
    """One format and the shape of its input."""

    format: Format
    heads: int
    head_dim: int
    groups: int = 2
    grid: str = "minmax"
    clip: float | None = 1.0


CASES = {
    "2-bit per channel, one head of 8": Case(Format(), heads=1, head_dim=8, groups=1),
    "2-bit per token, 8-bit metadata, one head of 8": Case(
        Format(k_axis="token", metadata_bits=8), heads=1, head_dim=8, groups=1
    ),
    "2-bit per channel, paper grid, float32 norms": Case(Format(token_scale=True), heads=3, head_dim=64, grid="paper"),
    "3-bit K, 2-bit V, groups of 128": Case(Format(k_bits=3, k_group=128), heads=2, head_dim=128),
    "4-bit K, 3-bit V, groups of 64, padded head_dim": Case(
        Format(k_bits=4, v_bits=3, k_group=64, v_group=64), heads=2, head_dim=80
    ),
    "2-bit per token over the whole head": Case(Format(k_axis="token", k_group=256, v_group=256), heads=2, head_dim=96),
    "2-bit per channel, 8-bit metadata, float16 norms, clipped": Case(
        Format(k_group=64, token_scale=True, norm_dtype="float16", metadata_bits=8), heads=3, head_dim=64, clip=0.85
    ),
    "3-bit per token, 8-bit metadata, padded head_dim": Case(
        Format(k_axis="token", k_bits=3, v_bits=4, metadata_bits=8), heads=1, head_dim=112
    ),
    "2-bit K, 3-bit V, 8-bit metadata, float16 norms, clipped by bits and group": Case(
        Format(v_bits=3, k_group=64, token_scale=True, norm_dtype="float16", metadata_bits=8),
        *(2, 80),
        clip=None,
    ),
    "2 bits, unbiased grid, 8-bit metadata, float16 norms, clipped by bits and group": Case(
        Format(token_scale=True, norm_dtype="float16", metadata_bits=8),
        heads=3,
        head_dim=80,
        grid="unbiased",
        clip=None,
    ),
    "4-bit K per token, 3-bit V, unbiased grid, padded head_dim": Case(
        Format(k_axis="token", k_bits=4, k_group=64, v_bits=3, v_group=64),
        *(1, 112),
        grid="unbiased",
        clip=0.9,
    ),
    "2.5-bit Lloyd-Max levels per token, one head of 24": Case(
        Format(k_bits=2.5, v_bits=2.5, k_axis="token", k_group=256, v_group=256, levels="lloyd"),
        *(1, 24, 1),
    ),
    "2.5-bit K, 3-bit V, Lloyd-Max levels per channel, float16 norms, padded head_dim": Case(
        Format(k_bits=2.5, v_bits=3, k_group=64, v_group=128, token_scale=True, norm_dtype="float16", levels="lloyd"),
        *(1, 80),
    ),
    "4-bit K, 2.5-bit V, Lloyd-Max levels per token": Case(
        Format(k_bits=4, v_bits=2.5, k_axis="token", k_group=256, v_group=64, levels="lloyd"),
        *(2, 128),
    ),
}


def integers(count: int, start: int) -> torch.Tensor:
    """Numbers in [-1, 1) that are exact in float32, by Fibonacci hashing."""
    i = torch.arange(start, start + count, dtype=torch.int64)
    return ((i * 2654435761) % 2**16).to(torch.float32) / 2**15 - 1


def planted(x: torch.Tensor) -> torch.Tensor:
    """Make the first four rows of x, `[..., rows, values]`, hard to round: ties of codes and float16, constants, 0."""
    x = x.clone()
    halves = torch.tensor([0.0, 3.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    x[..., 0, :] = halves.repeat(-(-x.shape[-1] // 8))[: x.shape[-1]]
    x[..., 1, :] = 0.7
    x[..., 2, :] = 0.0
    x[..., 3, :] = x[..., 3, :].abs() * 2**-9 + (1 + 2**-11)
    x[..., 3, 0] = 1 + 2**-11
    return x


def golden_input(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[N, H, G, D]`; the hard rows are channels of K and tokens of V."""
    shape = (case.groups, case.heads, case.format.record_tokens, case.head_dim)
    count = torch.Size(shape).numel()
    factor = 2.0 ** (torch.arange(case.head_dim) % 4 - 1)
    k, v = (integers(count, start).reshape(shape) for start in (1, 977))
    return planted((k * factor).mT).mT.contiguous(), planted(v)


def golden_records(case: Case) -> Records:
    """The records of a case."""
    return encode(*golden_input(case), format=case.format, grid=case.grid, clip=case.clip)


def to_hex(tensor: torch.Tensor | None) -> str | None:
    """The bytes of a tensor as hexadecimal digits."""
    return None if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes().hex()


def describe(records: Records) -> dict[str, Any]:
    """What is kept of records: a hash, the norms and super-scales, and all bytes when they are few."""
    data = to_hex(records.data) or ""
    entry = {
        "shape": list(records.data.shape),
        "sha256": hashlib.sha256(bytes.fromhex(data)).hexdigest(),
        "norms": to_hex(records.norms),
        "super_scales": to_hex(records.super_scales),
    }
    return entry | ({"data": data} if len(data) <= 2 * FULL_HEX_BYTES else {})


def main() -> None:
    """Write the golden file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", required=True, help="overwrite the golden file")
    parser.parse_args()
    GOLDEN_FILE.parent.mkdir(exist_ok=True)
    entries = {name: describe(golden_records(case)) for name, case in CASES.items()}
    GOLDEN_FILE.write_text(json.dumps({"schema_version": 1, "records": entries}, indent=1) + "\n")
    print(f"wrote {len(entries)} cases to {GOLDEN_FILE}")


if __name__ == "__main__":
    main()
