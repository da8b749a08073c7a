"""What shadows saw: how far the attention of a packed layer was from the same attention in full precision.

A shadowed layer keeps K and V in full precision beside its records. On some of the steps that read packed tokens, both
are attended to with the same queries. K, V and queries are those that the layer was given, in which the error of the
layers below is already: the figures are each layer's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerVerification:
    """One shadowed layer over its sampled steps; an error is ||o - o_full|| / ||o_full|| of one step's output.

    `reads` counts the steps that read packed tokens, `steps` those of them that were sampled. Without one of these,
    every figure is None.
    """

    index: int
    reads: int
    steps: int
    error_mean: float | None = None
    error_p99: float | None = None
    error_max: float | None = None
    cosine_mean: float | None = None


@dataclass(frozen=True)
class Verification:
    """All shadowed layers of a cache. `fraction` is the share of steps that was asked for."""

    layers: tuple[LayerVerification, ...]
    packed_layers: int
    fraction: float

    @property
    def sampled(self) -> list[LayerVerification]:
        """Layers with at least one sampled step."""
        return [layer for layer in self.layers if layer.steps]

    @property
    def steps(self) -> int:
        """The most steps that were sampled of one layer."""
        return max((layer.steps for layer in self.layers), default=0)

    @property
    def error_mean(self) -> float | None:
        """Mean error over all sampled steps of all layers; None without one."""
        count = sum(layer.steps for layer in self.layers)
        return sum((layer.error_mean or 0.0) * layer.steps for layer in self.layers) / count if count else None

    @property
    def worst(self) -> LayerVerification | None:
        """The layer with the largest error of one step; None without one."""
        return max(self.sampled, key=lambda layer: layer.error_max or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-ready data."""
        worst = self.worst
        return {
            "fraction": self.fraction,
            "packed_layers": self.packed_layers,
            "steps": self.steps,
            "error_mean": self.error_mean,
            "error_max": None if worst is None else worst.error_max,
            "worst_layer": None if worst is None else worst.index,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """One line."""
        worst = self.worst
        if worst is None:
            reads = max((layer.reads for layer in self.layers), default=0)
            what = f"none of {reads} steps that read packed tokens was sampled" if reads else "no step read packed ones"
            return f"not verified: {len(self.layers)} of {self.packed_layers} packed layers are shadowed, {what}"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return (
            f"verified: {len(self.sampled)} of {self.packed_layers} packed layers, {steps}: attention output error "
            f"{self.error_mean:.3f} mean, {worst.error_max:.3f} at worst (layer {worst.index})"
        )
