"""The error of each attention layer's output, watched while a model reads the same text through several caches."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from occamkv.integrations.transformers.model import attention_modules, decoders


class LayerWatch:
    """Compares what attention layers return with what they returned in the full-precision step just before.

    Use as a context manager. `begin(None, n)` starts the step of the full cache, `begin(name, n)` that of a method; the
    last n positions of the step count. Errors of earlier layers are part of a layer's input, as they are in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(attention_modules(decoders(model)[-1]))
        self._hooks: list[Any] = []
        self._name: str | None = None
        self._scored = 0
        self._expected: dict[int, Tensor] = {}
        self._sums: dict[str, dict[int, list[float]]] = {}

    def __enter__(self) -> LayerWatch:
        """Listen to all attention layers."""
        for index, module in self._modules:
            self._hooks.append(module.register_forward_hook(self._listener(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
        self._expected = {}

    def begin(self, name: str | None, scored: int) -> None:
        """Say whose step comes next and how many of its last positions count."""
        self._name, self._scored = name, scored

    def errors(self, name: str) -> dict[int, float]:
        """Return the relative error per layer: the norm of the difference over the norm of the full output."""
        sums = self._sums.get(name, {})
        return {index: (off / max(size, 1e-30)) ** 0.5 for index, (off, size) in sorted(sums.items())}

    def _listener(self, index: int) -> Any:
        def listen(_module: nn.Module, _args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if not self._scored:
                return
            out = out[:, -self._scored :].float()
            if self._name is None:
                self._expected[index] = out
                return
            expected = self._expected[index]
            sums = self._sums.setdefault(self._name, {}).setdefault(index, [0.0, 0.0])
            sums[0] += float((out - expected).square().sum())
            sums[1] += float(expected.square().sum())

        return listen
