"""What every result file says about where its numbers come from."""

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from occamkv import __version__

_KERNEL_FLAGS = ("avx", "amx", "f16c", "fma", "sse4", "asimd", "sve", "bf16", "i8mm")


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Return machine, versions, threads, date and command. `device`: where the model ran."""
    import torch
    import transformers

    program = Path(sys.argv[0])
    command = [program.name] if program.suffix != ".py" else ["python", os.path.relpath(program)]
    if sys.argv[0] in ("", "-c"):  # called from Python: the command that does the same
        command = ["occamkv"]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join([*command, *sys.argv[1:]]),
        "machine": f"{_cpu()}, {os.cpu_count()} cores" + ("" if device == "cpu" else f", {_accelerator(device)}"),
        "threads": torch.get_num_threads(),
        "versions": {
            "occamkv": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def cpu_conditions() -> dict[str, Any]:
    """Return what a measurement of speed says about the CPU: model, cores, flags that kernels use, load by now."""
    import torch

    flags = set((_cpu_field("flags") or _cpu_field("Features") or "").split())
    return {
        "model": _cpu(),
        "cores": os.cpu_count() or 1,
        "flags": sorted(flag for flag in flags if flag.startswith(_KERNEL_FLAGS)),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load_end": load_average(),
    }


def load_average() -> float:
    """Return the load average of the last minute; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cpu() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str | None:
    """Return a field of the first CPU in /proc/cpuinfo, or None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def _accelerator(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
