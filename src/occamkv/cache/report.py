"""The report: what a cache did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from occamkv.cache.verification import Verification
from occamkv.formats import PAGE_TOKENS

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """One layer. Bytes are those of its tensors; `full_bytes` is what K and V of its tokens take unpacked.

    `tokens` counts slots of a sequence, pads included; `packed_tokens` the packed tokens of all,
    `found_pins` those kept in full precision because of their norms, which `bits_per_value` counts. `reads_packed` and
    `reads_dense` count attention calls on packed bytes and calls that had to dequantize everything. `packing_starts` is
    the number of tokens at which the first group is packed. `dropped_tokens` of all sequences have left the window;
    `key_bias_pairs` pairs of channels are stored without the bias of the key projection. `shadow_bytes` are those of a
    full-precision copy that only verifies; they are counted apart.
    """

    index: int
    method: str
    reason: str | None = None
    backend: str | None = None
    bits_per_value: float | None = None
    tokens: int = 0
    packed_tokens: int = 0
    found_pins: int = 0
    packed_bytes: int = 0
    residual_bytes: int = 0
    pin_bytes: int = 0
    full_bytes: int = 0
    reads_packed: int = 0
    reads_dense: int = 0
    lossy_crops: int = 0
    packing_starts: int = PAGE_TOKENS
    dropped_tokens: int = 0
    key_bias_pairs: int = 0
    shadow_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the layer holds."""
        return self.packed_bytes + self.residual_bytes + self.pin_bytes

    @property
    def packs(self) -> bool:
        """Whether the layer is quantized by plan."""
        return self.reason is None and self.method != "full"


@dataclass(frozen=True)
class CacheReport:
    """All layers of a cache, and what its shadows saw if that was asked for. `print(report)` shows it."""

    layers: tuple[LayerReport, ...]
    verification: Verification | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers; those of shadows are counted apart."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def shadow_bytes(self) -> int:
        """Bytes of full-precision copies that only verify."""
        return sum(layer.shadow_bytes for layer in self.layers)

    @property
    def full_bytes(self) -> int:
        """Bytes of the same tokens in a full-precision cache."""
        return sum(layer.full_bytes for layer in self.layers)

    @property
    def packed_layers(self) -> list[LayerReport]:
        """Layers that are quantized by plan."""
        return [layer for layer in self.layers if layer.packs]

    @property
    def quantized(self) -> bool:
        """Whether any token is packed."""
        return any(layer.packed_tokens for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "cache_bytes": self.nbytes,
            "full_bytes": self.full_bytes,
            "shadow_bytes": self.shadow_bytes,
            "verification": None if self.verification is None else self.verification.to_json(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """A table with one line per run of layers that are alike, and the sums."""
        lines = [_line(run) for run in _runs(self.layers)]
        packed = self.packed_layers
        tokens = max((layer.tokens for layer in packed), default=0)
        if packed and not self.quantized:
            start = min(layer.packing_starts for layer in packed)
            when = "" if tokens < start else " real tokens of a sequence, at the latest with the next step"
            lines.append(f"nothing packed yet: {tokens} tokens, packing starts at {start}{when}")
        if any(layer.lossy_crops for layer in packed):
            lines.append("lossy crop: a cut group was decoded back into the residual and is no longer full precision")
        if self.nbytes:
            ratio = self.full_bytes / self.nbytes
            change = f"{ratio:.2f}x smaller"
            if ratio < 1:
                change = f"{1 / ratio:.2f}x larger: each residual has room for {PAGE_TOKENS} tokens"
            lines.append(f"all layers: {_mib(self.nbytes)} held, {_mib(self.full_bytes)} in full precision, {change}")
        if self.shadow_bytes:
            lines.append(f"beside that, shadows that verify: {_mib(self.shadow_bytes)}")
        if self.verification is not None:
            lines.append(str(self.verification))
        return "\n".join(lines)


def _runs(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    runs: list[list[LayerReport]] = []
    for layer in layers:
        alike = runs and _kind(runs[-1][0]) == _kind(layer)
        if alike:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _kind(layer: LayerReport) -> tuple[object, ...]:
    reads = (bool(layer.reads_packed), bool(layer.reads_dense))
    what = (layer.method, layer.reason, layer.backend, layer.bits_per_value, layer.tokens, layer.dropped_tokens)
    return (*what, layer.key_bias_pairs, reads)


def _line(run: list[LayerReport]) -> str:
    first, last = run[0], run[-1]
    name = f"layer {first.index}" if len(run) == 1 else f"layers {first.index}-{last.index}"
    size = _mib(sum(layer.nbytes for layer in run))
    if not first.packs:
        return f"{name}: full precision, {size}" + (f" ({first.reason})" if first.reason else "")
    bits = "" if first.bits_per_value is None else f" {first.bits_per_value:.2f} bits per value,"
    dense = ""
    if first.reads_dense and not first.reads_packed:
        dense = ", read dequantized: this model uses K and V outside the attention function"
    elif first.reads_dense:
        dense = f", {sum(layer.reads_dense for layer in run)} reads dequantized"
    gone = f" ({first.dropped_tokens} dropped)" if first.dropped_tokens else ""
    bias = f", key bias taken out of {first.key_bias_pairs} pairs of channels" if first.key_bias_pairs else ""
    return f"{name}: {first.method},{bits} {first.tokens} tokens{gone}, {size}, backend {first.backend}{bias}{dense}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"
