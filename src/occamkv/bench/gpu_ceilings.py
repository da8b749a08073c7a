"""What the memory of a GPU gives at best, measured beside everything that is compared with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from occamkv.bench.gpu_timing import Rig, take_turns

_BYTES = 2**31
_ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """GB/s: of reading alone, by the fastest of torch's reductions, and of a copy, read and written bytes together."""

    read_gb_per_s: float
    copy_gb_per_s: float

    def to_json(self) -> dict[str, float]:
        """Return JSON-ready data."""
        return asdict(self)


def measure_ceilings(rig: Rig, *, nbytes: int = _BYTES) -> Ceilings:
    """Measure both on random data of so many bytes, less where memory is short; a multiple of 16 KiB."""
    nbytes = min(nbytes, rig.memory_bytes // 4) // 2**14 * 2**14
    source = torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=rig.device)
    target = torch.empty_like(source)
    ones = torch.ones(2**12, dtype=torch.bfloat16, device=rig.device)
    values = torch.empty(nbytes // 2**13, 2**12, dtype=torch.bfloat16, device=rig.device).uniform_(-1, 1)
    contestants = {
        "copy": rig.replayed([lambda: target.copy_(source)]),
        "largest": rig.replayed([source.amax]),
        "sum": rig.replayed([values.sum]),
        "product": rig.replayed([lambda: values @ ones]),
    }
    found = {name: min(times.wall_ms) for name, times in take_turns(contestants, _ROUNDS).items()}
    copy = found.pop("copy")
    return Ceilings(read_gb_per_s=nbytes / min(found.values()) / 1e6, copy_gb_per_s=2 * nbytes / copy / 1e6)
