"""The plan: which method each layer uses, or why it is not quantized; shared by cache, report and planner."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occamkv.errors import OccamError, UnsupportedInput
from occamkv.methods import Method, method
from occamkv.methods.names import unnamed_overrides

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its index, its method (`full` when it is not quantized), and then the reason."""

    index: int
    method: Method
    reason: str | None = None

    @property
    def packs(self) -> bool:
        """Whether this layer is quantized."""
        return self.method.format is not None


@dataclass(frozen=True)
class Plan:
    """All layers of a model, in order, with the fingerprint and type of the model that it was made for."""

    layers: tuple[LayerPlan, ...]
    model_type: str = ""
    fingerprint: str = ""

    @property
    def packed_layers(self) -> int:
        """How many layers are quantized."""
        return sum(layer.packs for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        layers = []
        for layer in self.layers:
            overrides = unnamed_overrides(layer.method)
            pins = overrides.pop("pins", layer.method.pins)
            name = str(layer.method).rstrip("+")
            layers.append(
                {"index": layer.index, "method": name, "pins": pins, "overrides": overrides, "reason": layer.reason}
            )
        model = {"fingerprint": self.fingerprint, "model_type": self.model_type, "layers": len(self.layers)}
        return {"schema_version": SCHEMA_VERSION, "model": model, "layers": layers}

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Read a plan back.

        Raises:
            UnsupportedInput: The data is not a plan of this version.
            UnsupportedFormat: A method in it is not allowed.
        """
        if not isinstance(data, dict):
            raise UnsupportedInput(f"a plan is a JSON object, this is a {type(data).__name__}; see docs/plan.md.")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise UnsupportedInput(
                f"the plan has schema_version {data.get('schema_version')!r}; this version reads {SCHEMA_VERSION}."
            )
        try:
            layers = tuple(
                LayerPlan(
                    int(layer["index"]),
                    method(layer["method"], pins=layer["pins"], **layer["overrides"]),
                    layer["reason"],
                )
                for layer in data["layers"]
            )
            model = data["model"]
            plan = Plan(layers, model["model_type"], model["fingerprint"])
        except OccamError:
            raise
        except KeyError as error:
            raise UnsupportedInput(f"the plan lacks {error}; see docs/plan.md for its fields.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedInput(f"a field of the plan has the wrong type ({error}); see docs/plan.md.") from error
        indices = [layer.index for layer in plan.layers]
        if indices != list(range(len(indices))):
            raise UnsupportedInput(f"the plan has layers {indices}; allowed: each layer once, in order, from 0 on.")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            UnsupportedInput: The file is missing or is not a plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UnsupportedInput(f"cannot read the plan {str(path)!r}: {error.strerror}.") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UnsupportedInput(f"the plan {str(path)!r} is no JSON ({error}); see docs/plan.md.") from error
        try:
            return Plan.from_json(data)
        except OccamError as error:
            raise type(error)(f"the plan {str(path)!r} cannot be used: {error}") from error
