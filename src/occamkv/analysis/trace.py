"""The trace: post-RoPE Q, K and V of a real prompt, layer by layer, as the attention function saw them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from occamkv.analysis import received
from occamkv.analysis.tensor_file import TensorWriter, read_tensors
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.integrations.transformers.fingerprint import fingerprint
from occamkv.integrations.transformers.model import text_config
from occamkv.integrations.transformers.plan import plan_for
from occamkv.integrations.transformers.prompt import Prompt, read_prompt
from occamkv.integrations.transformers.rotary import key_biases
from occamkv.integrations.transformers.tracing import Call, trace_attention
from occamkv.methods.trial import Reading
from occamkv.ops.rope import KeyBias, Rotary
from occamkv.schema import NUMBER, check_fields, check_version

SCHEMA_VERSION = 1

_HEADER = "occamkv.trace"
_PARTS = ("received", "rows", "q", "k", "v", "hidden")
_KEY_BIAS = ("key_bias.frequencies", "key_bias.first", "key_bias.second", "key_bias.vector")
_SCHEMA = {
    "model_type": str,
    "fingerprint": str,
    "layer_count": int,
    "positions": [int],
    "texts": [str],
    "modality": [str],
    "layers": [
        {
            "index": int,
            "scale?": NUMBER,
            "softcap?": NUMBER,
            "window?": int,
            "causal": bool,
            "row_positions": [int],
        }
    ],
}


@dataclass(frozen=True)
class LayerTrace:
    """What one attention layer saw.

    Args:
        index: Number of the layer.
        q: `[B, Hq, T, D]` in model space, in the model's dtype.
        k: `[B, H, T, D]`.
        v: `[B, H, T, D]`.
        reading: Softmax scale, soft cap, learned sink logits.
        window: Sliding window in tokens, None for full attention.
        hidden: What entered the layer, `[B, T, C]`, if it was asked for and has this shape.
        received: float32 `[B, Hq, T]`: attention that each token got, summed over the queries that see it and divided
            by their number, if it was asked for.
        rows: float32 `[B, Hq, n, T]`: attention rows of `row_positions`, if they were asked for.
        row_positions: Positions of these queries in the prompt.
        causal: Attention follows from q, k, the reading, the window and `Trace.real` alone. False where the model adds
            a position bias, or lets a query see later tokens (parts of an image) or hides others.
        key_bias: What the layer adds to all keys of a head before it embeds positions, where that is known.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    reading: Reading = field(default_factory=Reading)
    window: int | None = None
    hidden: Tensor | None = None
    received: Tensor | None = None
    rows: Tensor | None = None
    row_positions: Sequence[int] = ()
    causal: bool = True
    key_bias: KeyBias | None = None


@dataclass(frozen=True)
class Trace:
    """All recorded layers of one forward pass. Its tensors are on the CPU, and their T is that of `positions`.

    Args:
        layers: In order; layers that were not asked for, or have no attention, are missing.
        ids: Token ids `[B, T]`.
        texts: Text of each token of the first sequence; without a tokenizer its id in square brackets.
        real: bool `[B, T]`, False for pads.
        modality: Name of the kind of each token of the first sequence: "text", "image", "audio", "video".
        model_type: As in the configuration.
        fingerprint: Of the configuration, see `integrations.transformers.fingerprint`.
        layer_count: How many layers the model has.
        positions: Which positions of the prompt were kept, ascending.
    """

    layers: tuple[LayerTrace, ...]
    ids: Tensor
    texts: tuple[str, ...]
    real: Tensor
    modality: tuple[str, ...]
    model_type: str
    fingerprint: str
    layer_count: int
    positions: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; docs/trace.md says what is in it."""
        with _TraceWriter(Path(path), self) as writer:
            for layer in self.layers:
                writer.add_layer(layer)
            writer.finish_trace()

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read what `save` or `record(spill=...)` wrote. Tensors are memory-mapped: read when they are used.

        Raises:
            UnsupportedInput: There is no such file, it is damaged, no trace, or of another version.
        """
        metadata, tensors = read_tensors(Path(path))
        if _HEADER not in metadata:
            raise UnsupportedInput(
                f"{str(path)!r} holds tensors, and no trace; allowed: what `Trace.save` or `record(spill=...)` wrote."
            )
        header = _read_header(metadata[_HEADER])
        _check_tensors(header, tensors)
        layers = [_read_layer(entry, tensors) for entry in header["layers"]]
        return Trace(
            tuple(layers),
            tensors["ids"],
            tuple(header["texts"]),
            tensors["real"],
            tuple(header["modality"]),
            header["model_type"],
            header["fingerprint"],
            header["layer_count"],
            tuple(header["positions"]),
        )

    def check_model(self, config: Any) -> None:
        """Raise `CacheMismatch` if the trace was recorded with a model of another configuration."""
        text = text_config(config)
        if fingerprint(text) != self.fingerprint:
            raise CacheMismatch(
                f"the trace is of {self.model_type or 'a model'} with fingerprint {self.fingerprint}, the model is "
                f"{text.model_type} with {fingerprint(text)}. Record a trace with this model."
            )


@dataclass(frozen=True)
class Selection:
    """What `record` keeps.

    Args:
        layers: Numbers of layers; default: all that have self-attention.
        positions: Positions in the prompt; default: all. Attention is that of the whole prompt in any case.
        hidden: Keep what entered each layer; left out where that is not one state per token.
        received: Keep the attention that each token got.
        rows: Positions of queries whose attention rows are kept.
    """

    layers: Sequence[int] | None = None
    positions: Sequence[int] | None = None
    hidden: bool = False
    received: bool = False
    rows: Sequence[int] = ()


def record(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    selection: Selection | None = None,
    tokenizer: Any = None,
    spill: str | Path | None = None,
) -> Trace:
    """Run a model over a prompt and record what its attention layers see; the model is left as it was.

    Args:
        model: A transformers model.
        inputs: Token ids `[B, T]` or `[T]`, or the arguments of the model as a tokenizer or processor made them.
        selection: What to keep; default: q, k and v of all layers and positions.
        tokenizer: Tells the texts of the tokens.
        spill: Write each layer to this file as soon as it was recorded; the trace that is returned reads it from there.

    Raises:
        UnsupportedModel: The model's attention does not go through transformers' attention interface.
        UnsupportedInput: The prompt is empty, a layer or position does not exist, or q, k or v hold NaN.
    """
    chosen, prompt = selection or Selection(), read_prompt(model, inputs)
    count, length = len(plan_for(model.config, "full").layers), prompt.ids.shape[1]
    _check_numbers("layers", chosen.layers, count)
    _check_numbers("positions", chosen.positions, length)
    _check_numbers("rows", chosen.rows or None, length)
    positions = range(length) if chosen.positions is None else sorted(set(chosen.positions))
    trace = replace(_frame(model, prompt, tuple(positions), tokenizer), layer_count=count)

    biases = key_biases(model)

    def run(take: Callable[[LayerTrace], None]) -> None:
        def consume(call: Call) -> None:
            take(replace(_layer(call, prompt.real, chosen, trace.positions), key_bias=biases.get(call.layer)))

        seen = trace_attention(model, prompt.inputs, consume, layers=chosen.layers, hidden=chosen.hidden)
        missing = sorted(set(chosen.layers or ()).difference(seen))
        if missing:
            raise UnsupportedInput(
                f"layers {missing} have no self-attention to record; layers that have: {sorted(seen)}."
            )

    if spill is None:
        layers: list[LayerTrace] = []
        run(layers.append)
        return replace(trace, layers=tuple(sorted(layers, key=lambda layer: layer.index)))
    with _TraceWriter(Path(spill), trace) as writer:
        run(writer.add_layer)
        writer.finish_trace()
    return Trace.load(spill)


def _frame(model: nn.Module, prompt: Prompt, positions: tuple[int, ...], tokenizer: Any) -> Trace:
    """Return a trace without layers."""
    at, text = torch.tensor(positions), text_config(model.config)
    ids, real = prompt.ids.cpu().long()[:, at], prompt.real.cpu()[:, at]
    texts = [f"[{token}]" if tokenizer is None else tokenizer.decode([token]) for token in ids[0].tolist()]
    modality = tuple(prompt.modality[position] for position in positions)
    return Trace((), ids, tuple(texts), real, modality, text.model_type, fingerprint(text), 0, positions)


def _check_numbers(name: str, wanted: Sequence[int] | None, count: int) -> None:
    if wanted is None:
        return
    wrong = [number for number in wanted if not 0 <= number < count]
    if wrong or not wanted:
        raise UnsupportedInput(f"{name} names {wrong or 'nothing'}; allowed: numbers from 0 to {count - 1}.")


def _layer(call: Call, real: Tensor, chosen: Selection, positions: Sequence[int]) -> LayerTrace:
    """Cut what one layer saw, and work out what is asked for besides."""
    for name, part in (("Q", call.q), ("K", call.k), ("V", call.v)):
        _refuse_nan(name, part, real, call.layer)
    at = torch.tensor(positions, device=call.q.device)
    per_token = call.hidden is not None and call.hidden.shape[:-1] == real.shape
    hidden = _kept(call.hidden, at, dim=1) if call.hidden is not None and per_token else None
    sums = _kept(received.received(call, real), at, dim=2) if chosen.received else None
    row_positions = tuple(sorted(set(chosen.rows)))
    picked = torch.tensor(row_positions, device=at.device)
    rows = _kept(received.rows(call, real, picked), at, dim=3) if row_positions else None
    sinks = None if call.reading.sinks is None else call.reading.sinks.cpu().clone()
    return LayerTrace(
        call.layer,
        _kept(call.q, at, dim=2),
        _kept(call.k, at, dim=2),
        _kept(call.v, at, dim=2),
        reading=call.reading._replace(sinks=sinks),
        window=call.window,
        hidden=hidden,
        received=sums,
        rows=rows,
        row_positions=row_positions,
        causal=received.is_causal(call, real),
    )


def _kept(x: Tensor, at: Tensor, *, dim: int) -> Tensor:
    """Copy some positions to the CPU."""
    return x.index_select(dim, at).cpu()


def _refuse_nan(name: str, x: Tensor, real: Tensor, layer: int) -> None:
    """Raise `UnsupportedInput` if a real token of `x`, `[B, H, T, D]`, holds a number that is not finite."""
    bad = (~x.isfinite()).any(-1).any(1) & real
    if bool(bad.any()):
        row, position = bad.nonzero()[0].tolist()
        raise UnsupportedInput(
            f"{name} of layer {layer} holds NaN or infinity, first at position {position} of sequence {row}. Load the "
            "model in bfloat16 or float32, and check its weights."
        )


class _TraceWriter(TensorWriter):
    """Writes a trace; its layers come one by one, and those that it may hold itself are not looked at."""

    def __init__(self, path: Path, trace: Trace) -> None:
        super().__init__(path)
        self._trace = trace
        self._layers: list[dict[str, Any]] = []
        self._sinks: dict[str, Tensor] = {}
        self.add("ids", trace.ids)

    def add_layer(self, layer: LayerTrace) -> None:
        """Write a layer."""
        name, reading = f"layers.{layer.index}.", layer.reading
        for part in _PARTS:
            tensor = getattr(layer, part)
            if tensor is not None:
                self.add(name + part, tensor)
        if layer.key_bias is not None:
            rotary = layer.key_bias.rotary
            bias = (rotary.frequencies, rotary.first, rotary.second, layer.key_bias.vector)
            for part, tensor in zip(_KEY_BIAS, bias, strict=True):
                self.add(name + part, tensor)
        if reading.sinks is not None:
            self._sinks[name + "sinks"] = reading.sinks
        self._layers.append(
            {
                "index": layer.index,
                "scale": reading.scale,
                "softcap": reading.softcap,
                "window": layer.window,
                "causal": layer.causal,
                "row_positions": list(layer.row_positions),
            }
        )

    def finish_trace(self) -> None:
        """Write the header, and what comes last since its number of bytes may be odd: sinks and `real`."""
        trace = self._trace
        for name, sinks in self._sinks.items():
            self.add(name, sinks)
        self.add("real", trace.real)
        header = {
            "schema_version": SCHEMA_VERSION,
            "model_type": trace.model_type,
            "fingerprint": trace.fingerprint,
            "layer_count": trace.layer_count,
            "positions": list(trace.positions),
            "texts": list(trace.texts),
            "modality": list(trace.modality),
            "layers": sorted(self._layers, key=lambda entry: entry["index"]),
        }
        self.finish({_HEADER: json.dumps(header)})


def _read_header(text: str) -> Any:
    try:
        header = json.loads(text)
    except ValueError:
        header = {}
    check_version(header, SCHEMA_VERSION, "record")
    try:
        check_fields(header, _SCHEMA, "its header", command="record")
    except UnsupportedInput as error:
        raise UnsupportedInput(f"the trace is damaged: {str(error).split(';')[0]}. Record it again.") from error
    return header


def _check_tensors(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedInput` if tensors are missing or do not fit together."""
    length = len(header["positions"])
    wanted = {"ids": 1, "real": 1}
    wanted |= {f"layers.{entry['index']}.{part}": 2 for entry in header["layers"] for part in ("q", "k", "v")}
    for name, dim in wanted.items():
        shape = list(tensors[name].shape) if name in tensors else None
        if shape is None or len(shape) != 2 * dim or shape[dim] != length:
            raise UnsupportedInput(
                f"the trace is damaged: tensor {name} has shape {shape}, and {length} positions were kept. Record it "
                "again."
            )
    if not len(header["texts"]) == len(header["modality"]) == length:
        raise UnsupportedInput(f"the trace is damaged: not every one of its {length} positions has a text.")


def _read_layer(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerTrace:
    name = f"layers.{entry['index']}."
    bias = [tensors[name + part] for part in _KEY_BIAS if name + part in tensors]
    return LayerTrace(
        entry["index"],
        tensors[name + "q"],
        tensors[name + "k"],
        tensors[name + "v"],
        reading=Reading(entry["scale"], entry["softcap"], tensors.get(name + "sinks")),
        window=entry["window"],
        hidden=tensors.get(name + "hidden"),
        received=tensors.get(name + "received"),
        rows=tensors.get(name + "rows"),
        row_positions=tuple(entry["row_positions"]),
        causal=entry["causal"],
        key_bias=KeyBias(Rotary(bias[0], bias[1], bias[2]), bias[3]) if len(bias) == len(_KEY_BIAS) else None,
    )
