"""What every result file says about where its numbers come from."""

import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from occamkv import __version__


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Return machine, versions, threads, date and command. `device`: where the model ran."""
    import torch
    import transformers

    program = Path(sys.argv[0])
    command = [program.name] if program.suffix != ".py" else ["python", os.path.relpath(program)]
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _accelerator(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
