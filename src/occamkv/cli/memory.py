"""How much memory a generation takes: of the process, and of the GPU that the model lies on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Memory:
    """What generating took: `growth_bytes` of the process; of a GPU `before_bytes` before and at most `peak_bytes`."""

    growth_bytes: int | None
    before_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def gpu(self) -> dict[str, int] | None:
        """Return the bytes of the GPU as JSON-ready data; None on a CPU."""
        return None if self.peak_bytes is None else {k: v for k, v in asdict(self).items() if k != "growth_bytes"}


class Watch:
    """Sees memory from now on."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._process, self._before = _resident_bytes(), None
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
            self._before = torch.cuda.memory_allocated(self._gpu)

    def read(self) -> Memory:
        """Return what was taken since."""
        grown = None if self._process is None else (_resident_bytes() or 0) - self._process
        if self._gpu is None:
            return Memory(grown)
        return Memory(grown, self._before, torch.cuda.max_memory_allocated(self._gpu))


def _resident_bytes() -> int | None:
    """Return the resident memory of this process, or None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
