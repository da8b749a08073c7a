"""Shadows: K and V of a few packed layers in full precision, to measure on a live run what packing does to attention.

Both reads of a sampled step have the same queries, mask, scale, soft cap and sinks. Queries, keys and values come from
the model as it runs, with the error of the layers below in them: what is measured is each layer's own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from occamkv.cache.verification import LayerVerification, Verification
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers.layer import PackedLayer


@dataclass(frozen=True)
class Verify:
    """What is shadowed, and how often.

    Args:
        layers: How many of the packed layers, from the first to the last at even distances (all, if there are fewer);
            or which.
        fraction: Of the steps that read packed tokens, in (0, 1]: one at random of every `1 / fraction`.
        seed: Of that choice.

    Raises:
        UnsupportedInput: A value is not allowed.
    """

    layers: int | tuple[int, ...] = 3
    fraction: float = 1 / 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UnsupportedInput(f"verify samples a fraction of {self.fraction} of the steps; allowed: above 0 to 1.")
        if not self.layers or (isinstance(self.layers, int) and self.layers < 0):
            raise UnsupportedInput(f"verify has layers={self.layers!r}; allowed: a number from 1 on, or layer numbers.")

    def chosen(self, packed: Sequence[int]) -> list[int]:
        """Return which of the packed layers of a cache are shadowed.

        Raises:
            UnsupportedInput: No layer is packed, or one that was named is not.
        """
        if not packed:
            raise UnsupportedInput("verify has nothing to look at: no layer of this cache is packed. Leave it out.")
        if isinstance(self.layers, int):
            count = min(self.layers, len(packed))
            return [packed[i * (len(packed) - 1) // max(1, count - 1)] for i in range(count)]
        strange = sorted(set(self.layers) - set(packed))
        if strange:
            raise UnsupportedInput(f"verify names layers {strange} that are not packed; allowed: {list(packed)}.")
        return sorted(set(self.layers))


def read_verify(verify: object) -> Verify | None:
    """Return what `verify=` of a cache asks for: True is `Verify()`.

    Raises:
        UnsupportedInput: It is something else.
    """
    if isinstance(verify, Verify):
        return verify
    if verify is None or isinstance(verify, bool):
        return Verify() if verify else None
    told = "; logits need a second pass: `occamkv run --receipt FILE`" if verify == "logits" else ""
    raise UnsupportedInput(f"verify is {verify!r}; allowed: True, a Verify(layers=, fraction=, seed=), or None{told}.")


class Shadow:
    """K and V of one layer as the model made them, `[B, H, S, D]` with pads, and the errors of sampled steps.

    It follows its layer by length: what the layer has forgotten is dropped when the next tokens come.
    """

    def __init__(self, verify: Verify) -> None:
        self.verify = verify
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._errors: list[float] = []
        self._cosines: list[float] = []
        self._random = Random(self.verify.seed)
        self._reads, self._stratum, self._next = 0, -1, -1

    @property
    def tokens(self) -> int:
        """Slots held."""
        return sum(k.shape[2] for k, _ in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(k.nbytes + v.nbytes for k, v in self._parts)

    def take(self, k: Tensor, v: Tensor, *, length: int) -> None:
        """Copy K and V of a step, `[B, H, T, D]`; `length`: slots that the layer holds with them."""
        before = length - k.shape[2]
        if self.tokens > before:
            held = self.copy()
            self._parts = [tuple(x[:, :, :before].clone() for x in held)] if before else []  # type: ignore[list-item]
        self._parts.append((_copied(k), _copied(v)))

    def copy(self) -> tuple[Tensor, Tensor]:
        """Return K and V of all slots."""
        if len(self._parts) > 1:
            k, v = zip(*self._parts, strict=True)
            self._parts = [(torch.cat(k, dim=2), torch.cat(v, dim=2))]
        return self._parts[0]

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was."""
        index = list(rows)
        self._parts = [(k[index], v[index]) for k, v in self._parts]

    def samples(self) -> bool:
        """Count a step that reads packed tokens; tell whether it is looked at."""
        at, self._reads = self._reads, self._reads + 1
        while self._next < at:
            self._stratum += 1
            self._next = int((self._stratum + self._random.random()) / self.verify.fraction)
        return self._next == at

    def note(self, out: Tensor, full: Tensor, kept: Tensor | None) -> None:
        """Note the error of a step.

        Args:
            out: What the packed read gave, `[B, T, Hq, D]`.
            full: The same in full precision.
            kept: bool `[B, T]`: which queries are those of real tokens; None when all are.
        """
        given, wanted = (x.float() if kept is None else x.float()[kept] for x in (out, full))
        tiny = torch.finfo(torch.float32).tiny
        self._errors.append(float((given - wanted).norm() / wanted.norm().clamp_min(tiny)))
        self._cosines.append(float((given * wanted).sum() / (given.norm() * wanted.norm()).clamp_min(tiny)))

    def verification(self, index: int) -> LayerVerification:
        """Return the figures, as those of layer `index`."""
        if not self._errors:
            return LayerVerification(index, self._reads, 0)
        errors = torch.tensor(self._errors, dtype=torch.float64)
        return LayerVerification(
            index,
            self._reads,
            len(errors),
            error_mean=float(errors.mean()),
            error_p99=float(errors.quantile(0.99)),
            error_max=float(errors.max()),
            cosine_mean=sum(self._cosines) / len(self._cosines),
        )


def _copied(x: Tensor) -> Tensor:
    """Return a copy that keeps no larger tensor alive."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def cast_shadows(layers: Sequence[Any], verify: Verify | None) -> None:
    """Give some packed layers of a new cache shadows.

    Raises:
        UnsupportedInput: See `Verify.chosen`; or a layer shall not give what full precision does.
    """
    if verify is None:
        return
    packed = {layer.index: layer for layer in layers if isinstance(layer, PackedLayer)}
    for index in verify.chosen(list(packed)):
        cache = packed[index].cache
        if cache is not None and (cache.method.window is not None or cache.pin_bias is not None):
            raise UnsupportedInput(
                f"layer {index} forgets tokens (window) or moves attention (pin_bias), so full precision is no measure "
                "of it. Leave verify out, or the window and pin_bias."
            )
        packed[index].shadow = Shadow(verify)


def verification_of(layers: Sequence[Any]) -> Verification:
    """Return what the shadows of a cache's layers saw.

    Raises:
        UnsupportedInput: It was made without shadows.
    """
    packed = [layer for layer in layers if isinstance(layer, PackedLayer)]
    shadows = {layer.index: layer.shadow for layer in packed if layer.shadow is not None}
    if not shadows:
        raise UnsupportedInput(
            "this cache has no shadows to verify it by. Make it with verify=True: PackedCache(model, verify=True) or "
            "attach(model, verify=True)."
        )
    rows = tuple(shadow.verification(index) for index, shadow in shadows.items())
    still_packed = sum(layer.cache is not None for layer in packed)
    return Verification(rows, still_packed, next(iter(shadows.values())).verify.fraction)
