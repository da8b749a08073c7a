"""`occamkv doctor`: what is installed, which backend is taken where, and why the others refuse."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.table import Table

from occamkv import __version__
from occamkv.cli.models import packaged_models
from occamkv.cli.shell import out, verb, write_json
from occamkv.methods import METHOD_NAMES, method

_PACKAGES = {
    "torch": "the library",
    "transformers": "models (extra hf)",
    "accelerate": "reading GGUF files (extra hf)",
    "gguf": "reading GGUF files (extra hf)",
    "typer": "this command (extra cli)",
    "rich": "this command (extra cli)",
    "matplotlib": "plots (extra plots)",
    "cuda-bindings": "NVIDIA GPUs (extra cuda)",
}


@verb("doctor")
def doctor(
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - for stdout.")] = None,
) -> None:
    """Say what is installed and which backend runs on each device, with the reason of every refusal."""
    report = examine()
    if json_file is not None:
        write_json(report, json_file)
        return
    out.print(f"occamkv {report['occamkv']}, Python {report['python']}, {report['machine']}", highlight=False)
    packages = Table("package", "version", "needed for")
    for name, entry in report["packages"].items():
        packages.add_row(name, entry["version"] or "not installed", entry["needed_for"])
    out.print(packages)
    devices = Table("device", "method", "backend", "refusals")
    everywhere = _common(report["backends"])
    for row in report["backends"]:
        own = [reason for reason in row["refusals"] if reason not in everywhere[row["device"]]]
        devices.add_row(row["device"], row["method"], row["backend"], "; ".join(own) or "none")
    out.print(devices)
    for device, reasons in everywhere.items():
        for reason in reasons:
            out.print(f"Whatever the method, on {device}: {reason}.", highlight=False, markup=False, soft_wrap=True)
    if "cuda" not in everywhere:
        torch_version = report["packages"]["torch"]["version"]
        out.print(f"NVIDIA GPUs: torch {torch_version} finds none.", highlight=False, markup=False, soft_wrap=True)
    out.print(f"Native CPU kernels: {_told(report['native'])}", highlight=False, markup=False, soft_wrap=True)
    models = Table("bundled model", "state", "about")
    for row in report["models"]:
        models.add_row(row["name"], "installed" if row["installed"] else f"run: {row['install']}", row["about"])
    out.print(models)


def examine() -> dict[str, Any]:
    """Return what `doctor` shows as JSON-ready data."""
    import torch

    from occamkv.kernels import backend_for, refusals

    backends = []
    for device in _devices():
        for name in METHOD_NAMES:
            chosen = method(name)
            if chosen.format is None:
                continue
            reasons = refusals(chosen.format, device)
            backends.append(
                {
                    "device": device,
                    "method": name,
                    "backend": backend_for(chosen.format, device).name,
                    "refusals": [f"{backend}: {reason}" for backend, reason in reasons.items() if reason],
                }
            )
    models = [
        {
            "name": name,
            "installed": importlib.util.find_spec(entry["module"]) is not None,
            "install": entry["install"],
            "about": entry["about"],
        }
        for name, entry in packaged_models().items()
    ]
    return {
        "schema_version": 1,
        "occamkv": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}",
        "packages": {name: {"version": _version(name), "needed_for": use} for name, use in _PACKAGES.items()},
        "backends": backends,
        "native": _native(),
        "models": models,
    }


def _common(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the refusals that hold for every method, by device."""
    found: dict[str, list[str]] = {}
    for row in rows:
        known = found.setdefault(row["device"], row["refusals"])
        found[row["device"]] = [reason for reason in known if reason in row["refusals"]]
    return found


def _native() -> dict[str, Any]:
    """Return the state of the C++ library: what it uses here, or why there is none."""
    import torch

    from occamkv.kernels.cpu import library

    reason = library.unavailable()
    return {
        "isa": None if reason else library.isa(),
        "isas": [] if reason else list(library.isas()),
        "threads": torch.get_num_threads(),
        "reason": reason,
    }


def _told(native: dict[str, Any]) -> str:
    """Return the state of the C++ library as a sentence."""
    if native["reason"]:
        return f"none. {native['reason']} The reference does the work, slower."
    others = ", ".join(name for name in native["isas"] if name != native["isa"]) or "nothing else"
    return f"{native['isa']} ({others} can be chosen with OCCAMKV_CPU_ISA), threads: {native['threads']}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """Return the kinds of device that torch can use here."""
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
