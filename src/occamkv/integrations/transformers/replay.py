"""A decode step of a whole model, recorded once in a CUDA graph and then replayed: one launch for each token."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from occamkv.cache import LayerCache
from occamkv.cache.stepping import Stepping
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.model import text_config
from occamkv.kernels import Stepper


class CapturedStep:
    """Decode steps of one token for each sequence: the first one runs, the second is recorded, all others replay it.

    ```python
    cache = PackedCache(model)
    logits = model(input_ids, past_key_values=cache).logits[:, -1:]
    with CapturedStep(model, cache, steps=256) as captured:
        for _ in range(256):
            logits = captured(logits.argmax(-1))
    ```

    Replays look at no number: K and V that no record can hold are found by `close`, after which the cache asks for a
    reset.

    Args:
        model: A transformers model on one CUDA device.
        cache: A cache that holds a prompt, all its layers packed.
        steps: Most steps that will be taken; pages for their tokens are allocated at once.

    Raises:
        UnsupportedInput: A step of this model or cache cannot be recorded; nothing was changed.
    """

    def __init__(self, model: nn.Module, cache: Cache, *, steps: int) -> None:
        if steps < 1:
            raise UnsupportedInput(f"steps is {steps}; allowed: at least 1.")
        self._model, self._cache = model, cache
        self._shared = [layer.shared for layer in cache.layers if isinstance(layer, PackedLayer)]
        self._layers: list[tuple[LayerCache, Stepping, Stepper | None]] = []
        caches = [_packed(index, layer) for index, layer in enumerate(cache.layers)]
        stores = [store for one in caches if (store := one.store) is not None]
        devices = {store.residual_k.device for store in stores}
        if len(stores) < len(caches) or not caches:
            raise UnsupportedInput("the cache holds no prompt yet; call the model with it first.")
        reason = f"its layers lie on {len(devices)} devices" if len(devices) > 1 else refuses_device(*devices)
        if reason is not None:
            raise UnsupportedInput(f"steps of this model cannot be recorded: {reason}. Call the model itself.")
        heads = text_config(model.config).num_attention_heads
        try:
            for one in caches:
                stepping = one.reserve(steps, query_heads=heads)
                self._layers.append((one, stepping, stepping.stepper))
        except Exception:
            self.close()
            raise
        self._positions = torch.tensor([[row.tokens] for row in stores[0].rows], device=stores[0].residual_k.device)
        self._tokens = torch.zeros_like(self._positions)
        self._length, self._last = caches[0].length, caches[0].length + steps
        self._replay: Callable[[], object] | None = None
        self._logits: Tensor | None = None
        self._warm = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Take one token of each sequence, int64 `[B, 1]`, and return the logits, `[B, 1, V]`.

        Raises:
            UnsupportedInput: More steps than were announced, or tokens of another shape.
            CacheMismatch: The cache was changed since, or its steps cannot be recorded after all.
        """
        length = self._check(tokens)
        self._tokens.copy_(tokens)
        self._positions += length - self._length  # other steps may have come between
        self._length = length
        if not self._warm:
            out, self._warm = self._forward(), True
        else:
            if self._replay is None or self._logits is None:
                self._replay, self._logits = record(self._unrun)
            self._replay()
            for cache, _, _ in self._layers:
                cache.advance()
            out = self._logits.clone()
        return out

    def _check(self, tokens: Tensor) -> int:
        """Return how many slots the cache holds."""
        if tokens.shape != self._tokens.shape:
            raise UnsupportedInput(f"tokens are {tuple(tokens.shape)}; allowed: {tuple(self._tokens.shape)}.")
        if not self._layers or not all(stepping.stepper is stepper for _, stepping, stepper in self._layers):
            raise CacheMismatch(
                "these steps were closed, or the cache was changed since they were announced, or the first of them was "
                "no plain one (a mask, a bias of positions). Call the model itself, or make a new CapturedStep."
            )
        length = self._layers[0][0].length
        if length >= self._last:
            raise UnsupportedInput("all steps that were announced are taken. Make a new CapturedStep with more.")
        return length

    @torch.no_grad()
    def _forward(self) -> Tensor:
        given: dict[str, Any] = {"position_ids": self._positions, "past_key_values": self._cache, "use_cache": True}
        out: Tensor = self._model(input_ids=self._tokens, **given).logits
        return out

    def _unrun(self) -> Tensor:
        """Call the model without counting anything: the device runs it later, if at all."""
        for _, stepping, _ in self._layers:
            stepping.recording = True
        try:
            return self._forward()
        finally:
            for _, stepping, _ in self._layers:
                stepping.recording = False

    def close(self) -> None:
        """Make the cache an ordinary one again: what is left over is packed, pages that were not needed go back.

        Raises:
            UnsupportedInput: A step stored what is no number; the cache now asks for a reset.
        """
        layers, self._layers, self._replay = self._layers, [], None
        errors = []
        for cache, stepping, _ in layers:
            try:
                cache.finish(stepping)
            except UnsupportedInput as error:
                errors.append(error)
        if errors:
            for shared in self._shared:
                shared.broken = True
            raise errors[0]

    def __enter__(self) -> CapturedStep:
        """Return the steps themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        self.close()


def refuses_device(device: torch.device) -> str | None:
    """Return why no graph can be recorded on a device, or None."""
    return None if device.type == "cuda" else f"graphs are CUDA's, and the cache lies on {device.type}"


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record the launches of a call in a CUDA graph; return what replays them, and the output that they write."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = step()
    return graph.replay, out


def _packed(index: int, layer: Any) -> LayerCache:
    """Return the packed tokens of a layer.

    Raises:
        UnsupportedInput: It is not packed, or somebody looks on.
    """
    if not isinstance(layer, PackedLayer) or layer.cache is None:
        raise UnsupportedInput(
            f"layer {index} is not packed, and what transformers keeps of it grows with each step, so none can be "
            "recorded. Call the model itself."
        )
    if layer.looked_at:
        raise UnsupportedInput(
            f"layer {index} is looked at in every step (verify, a budget that is not yet spent, a trace), so none can "
            "be recorded. Call the model itself."
        )
    return layer.cache
