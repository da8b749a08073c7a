"""What a benchmark is asked for, checked before anything is built."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from occamkv import kernels
from occamkv.bench.timing import MIN_REPETITIONS
from occamkv.errors import BackendUnavailable, UnsupportedInput
from occamkv.formats.format import PAGE_TOKENS, check_head_dim
from occamkv.kernels import Backend
from occamkv.methods import Method, method

MOST_TOKENS = 128 * 1024
CPU = torch.device("cpu")

Progress = Callable[[str, int, int], object]
"""Called with the stage, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Shape:
    """The attention of one layer.

    Raises:
        UnsupportedInput: The query heads are no multiple of the KV heads.
        UnsupportedFormat: No record holds this head_dim.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        """Refuse heads that no attention has."""
        if self.kv_heads < 1 or self.query_heads < 1 or self.query_heads % self.kv_heads:
            raise UnsupportedInput(
                f"shape {self.name!r} has {self.query_heads} query heads and {self.kv_heads} KV heads; allowed: a "
                "multiple of the KV heads, for example 32/8/128 (query heads/KV heads/head_dim)."
            )
        check_head_dim(self.head_dim)


@dataclass(frozen=True)
class Setting:
    """What all benchmarks are asked for.

    Args:
        contexts: Tokens that are attended to, those of the step included.
        methods: Names of methods that pack, with settings of their own (no budget).
        threads: Each number of torch threads is measured by itself.
        repetitions: Turns of each contestant, at least 5.
        backend: Name of a backend; None for the first that takes format and device.

    Raises:
        UnsupportedInput: A value is not allowed; the message says which.
        UnsupportedFormat: A method does not exist.
        BackendUnavailable: The backend does not exist or refuses a format.
    """

    contexts: Sequence[int] = (4096, 16384, 65536)
    methods: Sequence[str] = ("occam",)
    threads: Sequence[int] = (1,)
    repetitions: int = 9
    backend: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_list("contexts", self.contexts, 1, MOST_TOKENS)
        check_list("threads", self.threads, 1, os.cpu_count() or 1)
        if self.repetitions < MIN_REPETITIONS:
            raise UnsupportedInput(f"repetitions is {self.repetitions}; allowed: {MIN_REPETITIONS} or more.")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UnsupportedInput(f"methods are {', '.join(self.methods)!r}; allowed: one or more, each once.")
        for one in self.chosen:
            backend_of(one, self.backend)

    @property
    def chosen(self) -> list[Method]:
        """The methods."""
        return [packing_method(name) for name in self.methods]


def ticker(progress: Progress | None, stage: str, total: int) -> Callable[[], object] | None:
    """Return what tells `progress` that one more of `total` rounds of a stage is done."""
    rounds = itertools.count(1)
    return None if progress is None else lambda: progress(stage, next(rounds), total)


def check_list(name: str, values: Sequence[int], low: int, high: int) -> None:
    """Raise `UnsupportedInput` unless `values` are different numbers, at least one, from `low` to `high`."""
    if not values or len(set(values)) < len(values) or not all(low <= value <= high for value in values):
        raise UnsupportedInput(
            f"{name} are {', '.join(map(str, values))!r}; allowed: different numbers from {low} to {high}."
        )


def packed_of(method: Method, context: int, queries: int) -> int:
    """Return how many of `context` tokens are packed when the newest `queries` of them attend.

    Raises:
        UnsupportedInput: None is.
    """
    packed = method.packed_tokens(context - queries)
    if packed <= 0:
        least = PAGE_TOKENS + method.pinned_tokens + method.pinning.lowest + queries
        raise UnsupportedInput(
            f"context {context}: {method} packs nothing of so few tokens; allowed: contexts of {least} or more."
        )
    return packed


def packing_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        UnsupportedFormat: It does not exist.
        UnsupportedInput: It packs nothing, or chooses its settings by a model.
    """
    found = method(name)
    if found.format is None:
        raise UnsupportedInput(f"method {name!r} packs nothing; allowed: methods that pack (`occamkv methods`).")
    if found.budget is not None:
        raise UnsupportedInput(
            f"method {name!r} chooses its settings layer by layer; allowed: methods that say them, such as occam."
        )
    return found


def backend_of(method: Method, name: str | None) -> Backend:
    """Return the backend with this name, or the one that the cache would take.

    Raises:
        BackendUnavailable: It does not exist or refuses the method's format on a CPU.
    """
    if name is None:
        return kernels.backend_for(method.packed_format, CPU)
    if name not in kernels.BACKENDS:
        raise BackendUnavailable(f"there is no backend {name!r}; allowed: {', '.join(kernels.BACKENDS)}.")
    refusal = kernels.backend(name).refuses(method.packed_format, CPU)
    if refusal is not None:
        raise BackendUnavailable(f"backend {name!r} refuses {method}: {refusal} Leave --backend out.")
    return kernels.backend(name)
