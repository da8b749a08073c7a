"""How fast: one backend per kind of device, same function names as the reference."""

from functools import cache
from importlib import import_module
from typing import cast

import torch

from occamkv.errors import BackendUnavailable
from occamkv.formats import Format
from occamkv.kernels.contract import Backend, FullTokens, PackedTokens, StepLayer, Stepper

__all__ = [
    "BACKENDS",
    "Backend",
    "FullTokens",
    "PackedTokens",
    "StepLayer",
    "Stepper",
    "backend",
    "backend_for",
    "refusals",
]

BACKENDS = ("cuda", "cpu", "reference")
"""Names of the backends, fastest first."""


def refusals(format: Format, device: torch.device | str, head_dim: int | None = None) -> dict[str, str | None]:
    """Return, for each backend, why it refuses this format on this device, or None if it takes it."""
    where = torch.device(device)
    return {name: backend(name).refuses(format, where, head_dim) for name in BACKENDS}


def backend_for(format: Format, device: torch.device | str, head_dim: int | None = None) -> Backend:
    """Return the first backend that does not refuse.

    Raises:
        BackendUnavailable: All refuse; the message holds each reason.
    """
    reasons = refusals(format, device, head_dim)
    for name, reason in reasons.items():
        if reason is None:
            return backend(name)
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(f"no backend takes {format} on {device} ({told}).")


@cache
def backend(name: str) -> Backend:
    """Return a backend by name, one of `BACKENDS`."""
    return cast(Backend, import_module(f"occamkv.kernels.{name}"))
