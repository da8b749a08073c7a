"""The trace: attention that tokens received, against eager attention; what is cut, saved, read back and refused."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integrations.architectures import TINY
from integrations.steps import difference, prompt, words
from occamkv.analysis import received
from occamkv.analysis.trace import LayerTrace, Selection, Trace, record
from occamkv.errors import CacheMismatch, UnsupportedInput
from occamkv.integrations.transformers.model import decoders
from occamkv.integrations.transformers.tracing import Call
from occamkv.methods.trial import Reading
from storage_meter import StorageMeter

LLAMA = TINY["llama"]
PADDED = {0: 45, 1: 38}
ROWS = (0, 9, 44)
ALL_OF_IT = Selection(hidden=True, received=True, rows=ROWS)
SINKS = "gpt_oss with learned sinks"
SOME = [
    "llama",
    "qwen2 with a large key bias",
    "gemma2 with a soft cap",
    "gemma3",
    "gemma4 with shared KV",
    SINKS,
    "qwen3_next with linear layers",
    "llava with an image",
    "t5, an encoder and a decoder",
    "bart, an encoder and a decoder",
]


def eager_attention(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor | None]:
    """The attention weights `[B, Hq, T, T]` of each layer that transformers itself puts out."""
    decoders(model)[0].set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, use_cache=False)
    return list(out.decoder_attentions if model.config.is_encoder_decoder else out.attentions)


def sight(real: Tensor, window: int | None) -> Tensor:
    """What is seen, bool `[B, 1, T, T]`, token by token."""
    batch, length = real.shape
    seen = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                near = window is None or i - j < window
                seen[b, 0, i, j] = near and bool(real[b, i]) and bool(real[b, j])
    return seen


@pytest.mark.parametrize("block", [1, 7 * 2 * 4 * 45, 2**30], ids=["a query at a time", "7 queries", "all at once"])
@pytest.mark.parametrize("name", SOME)
def test_received_and_rows_are_those_of_eager_attention(name, block, monkeypatch):
    monkeypatch.setattr(received, "_LOGITS", block)
    tiny = TINY[name]
    model, inputs = tiny.build_traceable(), prompt(tiny, PADDED)
    trace = record(model, inputs, selection=Selection(received=True, rows=ROWS))
    full = [weights for weights in eager_attention(model, inputs) if weights is not None]
    full = [
        full[layer.index] if len(full) > len(trace.layers) else weights
        for layer, weights in zip(trace.layers, full, strict=True)
    ]
    for layer, weights in zip(trace.layers, full, strict=True):
        seen = sight(trace.real, layer.window)
        mean = (weights * seen).sum(2) / seen.sum(2).clamp_min(1)
        assert layer.received.dtype == torch.float32
        assert difference(layer.received, mean) < 1e-5
        wanted = (weights * seen)[:, :, list(ROWS)]
        assert layer.rows.shape == wanted.shape and layer.row_positions == ROWS
        assert difference(layer.rows, wanted) < 3e-5
    assert any(layer.window == 32 for layer in trace.layers) == ("sliding_window" in tiny.fields)


@pytest.mark.parametrize("lost", ["sinks", "softcap", "window", "pads"])
def test_twin_what_bends_attention_would_be_missed(lost, monkeypatch):
    tiny = TINY["gemma2 with a soft cap" if lost == "softcap" else SINKS]
    model, inputs = tiny.build(), prompt(tiny, PADDED)
    plain = received.received

    def without(call: Call, real: Tensor) -> Tensor:
        if lost in ("sinks", "softcap"):
            return plain(call._replace(reading=call.reading._replace(**{lost: None})), real)
        if lost == "pads":
            return plain(call._replace(mask=None), torch.ones_like(real))
        return plain(call._replace(mask=None), real)

    monkeypatch.setattr(received, "received", without)
    layer = record(model, inputs, selection=Selection(received=True)).layers[1]
    seen = sight(inputs["attention_mask"].bool(), layer.window)
    expected = (eager_attention(model, inputs)[1] * seen).sum(2) / seen.sum(2).clamp_min(1)
    assert difference(layer.received, expected) > 1e-3


@pytest.mark.parametrize("name", ["llama", SINKS, "t5, an encoder and a decoder", "llava with an image"])
def test_causal_says_whether_attention_follows_from_what_the_trace_holds(name):
    tiny = TINY[name]
    layers = record(tiny.build_traceable(), prompt(tiny, PADDED)).layers
    assert {layer.causal for layer in layers} == {name != "t5, an encoder and a decoder"}


MASKS = {
    "plain": (torch.ones(8, 8, dtype=torch.bool).tril(), True),
    "plain, additive": (torch.full((8, 8), torch.finfo(torch.float32).min).triu(1), True),
    "a later token is seen": (torch.ones(8, 8, dtype=torch.bool).tril(1), False),
    "an earlier one is hidden": (torch.ones(8, 8, dtype=torch.bool).tril().triu(-6), False),
    "a bias": (torch.full((8, 8), torch.finfo(torch.float32).min).triu(1) + 0.5 * torch.eye(8), False),
}


@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("block", [1, 2**20])
def test_a_mask_is_causal_or_not(what, block, monkeypatch):
    monkeypatch.setattr(received, "_LOGITS", block)
    mask, causal = MASKS[what]
    x = torch.randn(1, 1, 8, 4)
    call = Call(0, x, x, x, mask[None, None], None, True, Reading(), None, None)
    assert received.is_causal(call, torch.ones(1, 8, dtype=torch.bool)) == causal
    assert not received.is_causal(call._replace(mask=None, causal=False), torch.ones(1, 8, dtype=torch.bool))


def test_no_matrix_of_all_queries_and_keys_is_held():
    length = 2048
    q, k = torch.randn(1, 2, length, 8), torch.randn(1, 1, length, 8)
    call = Call(0, q, k, k, None, None, True, Reading(), None, None)
    with StorageMeter() as meter:
        received.received(call, torch.ones(1, length, dtype=torch.bool))
    assert meter.peak < 0.5 * length * length * 4


def test_twin_a_whole_matrix_would_be_seen(monkeypatch):
    monkeypatch.setattr(received, "_LOGITS", 2**40)
    with pytest.raises(AssertionError):
        test_no_matrix_of_all_queries_and_keys_is_held()


def tensors(trace: Trace) -> dict[str, Tensor]:
    """All tensors of a trace by name."""
    found = {"ids": trace.ids, "real": trace.real}
    for layer in trace.layers:
        for field in dataclasses.fields(LayerTrace):
            if isinstance(value := getattr(layer, field.name), Tensor):
                found[f"{layer.index}.{field.name}"] = value
        if layer.reading.sinks is not None:
            found[f"{layer.index}.sinks"] = layer.reading.sinks
        if layer.key_bias is not None:
            rotary = layer.key_bias.rotary
            found[f"{layer.index}.key_bias"] = layer.key_bias.vector
            found |= {f"{layer.index}.{name}": getattr(rotary, name) for name in ("frequencies", "first", "second")}
    return found


def same(a: Trace, b: Trace) -> bool:
    """Tell whether two traces agree to the bit, dtypes included."""
    ours, theirs = tensors(a), tensors(b)
    plain = [[dataclasses.replace(t, layers=(), ids=None, real=None) for t in (a, b)]]
    plain += [
        [
            dataclasses.replace(
                x, q=None, k=None, v=None, hidden=None, received=None, rows=None, reading=None, key_bias=None
            )
            for x in pair
        ]
        for pair in zip(a.layers, b.layers, strict=True)
    ]
    readings = [layer.reading[:2] for layer in a.layers] == [layer.reading[:2] for layer in b.layers]
    bits = [torch.equal(ours[x], theirs[x]) and ours[x].dtype == theirs[x].dtype for x in ours if x in theirs]
    return ours.keys() == theirs.keys() and all(x == y for x, y in plain) and readings and all(bits)


KINDS = ["llama", SINKS, "gemma2 with a soft cap", "llava with an image", "qwen3_next with linear layers"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_trace_is_read_back_as_it_was_written_byte_for_byte(name, dtype, tmp_path):
    model, inputs = TINY[name].build(dtype), prompt(TINY[name], PADDED)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    selection = dataclasses.replace(ALL_OF_IT, positions=range(2, 45))
    trace = record(model, inputs, selection=selection, tokenizer=Words())
    assert trace.layers[0].q.dtype == dtype and (trace.layers[0].key_bias is not None) == (name == SINKS)
    spilled = record(model, inputs, selection=selection, tokenizer=Words(), spill=tmp_path / "spilled")
    trace.save(tmp_path / "saved")
    loaded = Trace.load(tmp_path / "saved")
    loaded.save(str(tmp_path / "again"))
    assert same(trace, loaded) and same(trace, spilled)
    written = [(tmp_path / name).read_bytes() for name in ("saved", "again", "spilled")]
    assert written[0] == written[1] == written[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "saved", "spilled"]


def test_twin_a_bit_that_changed_would_be_seen(tmp_path):
    trace = record(LLAMA.build(), prompt(LLAMA, PADDED))
    trace.save(tmp_path / "trace")
    data = bytearray((tmp_path / "trace").read_bytes())
    data[-2000] ^= 1
    (tmp_path / "trace").write_bytes(data)
    assert not same(trace, Trace.load(tmp_path / "trace"))


def test_the_file_is_one_that_others_can_read(tmp_path):
    from safetensors.torch import load_file

    trace = record(LLAMA.build(), prompt(LLAMA, PADDED), selection=ALL_OF_IT)
    trace.save(tmp_path / "trace")
    found = load_file(tmp_path / "trace")
    assert set(found) >= {"ids", "real", "layers.0.q", "layers.1.k", "layers.1.v", "layers.0.hidden"}
    assert torch.equal(found["layers.1.received"], trace.layers[1].received)


LAYERS, LENGTH = 8, 512


def more_than_the_model_holds(spill: Path | None) -> float:
    """Bytes held at the most while recording beyond those that a pass takes anyway, in layers of a trace."""
    tiny = dataclasses.replace(LLAMA, fields={"num_hidden_layers": LAYERS})
    model, ids = tiny.build(), words(LENGTH)
    with torch.no_grad(), StorageMeter() as plain:
        model.model(ids[None], use_cache=False)
    with StorageMeter() as meter, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trace, "load", staticmethod(lambda path: None))
        record(model, ids, selection=Selection(hidden=True), spill=spill)
    one_layer = LENGTH * (4 * 32 + 2 * 2 * 32 + 64) * 4
    return (meter.peak - plain.peak) / one_layer


def test_with_spill_no_more_than_one_layer_is_held(tmp_path):
    assert more_than_the_model_holds(tmp_path / "trace") < 1.5


def test_twin_without_spill_all_layers_are_held():
    assert more_than_the_model_holds(None) > LAYERS - 1


def test_a_trace_that_was_spilled_reads_a_layer_when_it_is_used(tmp_path):
    path = tmp_path / "trace"
    trace = record(LLAMA.build(), words(400), spill=path)
    used = trace.layers[0].k.clone()
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place: what was not used yet is read from there
        file.seek(4096)
        file.write(bytes(size - 4096))
    assert bool((used != 0).any())
    assert bool((trace.layers[1].v == 0).all())


def test_layers_and_positions_cut_what_is_kept():
    model, inputs = LLAMA.build(), prompt(LLAMA, PADDED)
    whole = record(model, inputs, selection=ALL_OF_IT)
    at = [3, 17, 18, 44]
    cut = record(model, inputs, selection=dataclasses.replace(ALL_OF_IT, layers=[1], positions=[44, 18, 17, 3, 3]))
    assert [layer.index for layer in cut.layers] == [1] and cut.layer_count == 2
    assert cut.positions == (3, 17, 18, 44) and len(cut.texts) == len(cut.modality) == 4
    assert torch.equal(cut.ids, whole.ids[:, at]) and torch.equal(cut.real, whole.real[:, at])
    for part, dim in (("q", 2), ("k", 2), ("v", 2), ("hidden", 1), ("received", 2), ("rows", 3)):
        assert torch.equal(
            getattr(cut.layers[0], part), getattr(whole.layers[1], part).index_select(dim, torch.tensor(at))
        )
    assert cut.layers[0].row_positions == ROWS


class Words:
    """A tokenizer whose words are numbers."""

    def decode(self, ids: list[int]) -> str:
        return f" w{ids[0]} \u00e9"


def test_what_a_trace_says_of_the_prompt():
    inputs = prompt(LLAMA, PADDED)
    trace = record(LLAMA.build(), inputs, tokenizer=Words())
    assert trace.texts == tuple(f" w{token} \u00e9" for token in inputs["input_ids"][0].tolist())
    assert torch.equal(trace.real, inputs["attention_mask"].bool()) and torch.equal(trace.ids, inputs["input_ids"])
    assert trace.positions == tuple(range(45)) and trace.model_type == "llama"
    bare = record(LLAMA.build(), words(3).int())
    assert bare.texts == tuple(f"[{token}]" for token in words(3).tolist()) and bare.ids.dtype == torch.int64


def test_the_modality_of_each_token_is_kept(tmp_path):
    tiny = TINY["llava with an image"]
    record(tiny.build(), prompt(tiny, {0: 12}), spill=tmp_path / "trace")
    trace = Trace.load(tmp_path / "trace")
    assert trace.modality == ("text",) * 5 + ("image",) * 4 + ("text",) * 3


def test_a_trace_of_another_model_is_refused():
    model = LLAMA.build()
    trace = record(model, words(5))
    trace.check_model(model.config)
    other = dataclasses.replace(LLAMA, fields={"intermediate_size": 64}).build()
    with pytest.raises(CacheMismatch, match=r"the trace is of llama with fingerprint \w{16}, .* Record a trace with"):
        trace.check_model(other.config)


WRONG = {
    "a layer that is not there": (Selection(layers=[0, 2]), r"layers names \[2\]; allowed: numbers from 0 to 1"),
    "a negative layer": (Selection(layers=[-1]), r"layers names \[-1\]; allowed: numbers from 0 to 1"),
    "no layer": (Selection(layers=[]), "layers names nothing; allowed: numbers from 0 to 1"),
    "a position behind the prompt": (Selection(positions=[5]), r"positions names \[5\]; allowed: numbers from 0 to 4"),
    "a row behind the prompt": (Selection(rows=[9]), r"rows names \[9\]; allowed: numbers from 0 to 4"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_exist_cannot_be_selected(what, tmp_path):
    selection, told = WRONG[what]
    with pytest.raises(UnsupportedInput, match=told):
        record(LLAMA.build(), words(5), selection=selection, spill=tmp_path / "trace")
    assert not list(tmp_path.iterdir())


def test_a_layer_without_attention_cannot_be_selected():
    with pytest.raises(UnsupportedInput, match=r"layers \[1\] have no self-attention to record; .* have: \[0\]"):
        record(TINY["qwen3_next with linear layers"].build(), words(5), selection=Selection(layers=[1]))


def test_hidden_states_of_another_shape_are_left_out():
    for name, kept in (("gemma3n with shared KV", False), ("gemma4 with shared KV", True)):
        layers = record(TINY[name].build(), words(5), selection=Selection(hidden=True)).layers
        assert [layer.hidden is not None for layer in layers] == [kept] * 4


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_with_its_layer_and_position(part, value, tmp_path):
    model, ids = LLAMA.build(), words(40)
    projection = getattr(model.model.layers[1].self_attn, f"{part}_proj")

    def spoil(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, 17:, 3] = value
        return out

    projection.register_forward_hook(spoil)
    before = tmp_path / "trace"
    before.write_bytes(b"as it was")
    with pytest.raises(
        UnsupportedInput, match=f"{part.upper()} of layer 1 holds NaN or infinity, first at position 17"
    ):
        record(model, ids, spill=before)
    assert before.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [before]


def test_pads_may_hold_anything():
    tiny = dataclasses.replace(LLAMA, fields={"num_hidden_layers": 1})
    model, inputs = tiny.build(), prompt(tiny, PADDED)
    selection = Selection(received=True, rows=[0, 44])
    expected = record(model, inputs, selection=selection).layers[0]

    def spoil(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out.masked_fill(inputs["attention_mask"][:, :, None] == 0, float("nan"))

    for name in ("q_proj", "k_proj"):
        getattr(model.model.layers[0].self_attn, name).register_forward_hook(spoil)
    found = record(model, inputs, selection=selection).layers[0]
    assert bool(found.q.isnan().any()) and bool(found.k.isnan().any())
    assert torch.equal(found.received, expected.received) and torch.equal(found.rows, expected.rows)
    assert bool((found.rows[1, :, 0] == 0).all()), "the row of a pad"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite(path: Path, change: Any) -> None:
    """Change the header of a trace: its JSON in the metadata, and the list of tensors."""
    tensors, data = header_of(path)
    header = json.loads(tensors["__metadata__"]["occamkv.trace"])
    change(header, tensors)
    if "occamkv.trace" in tensors["__metadata__"]:
        tensors["__metadata__"]["occamkv.trace"] = json.dumps(header)
    text = json.dumps(tensors).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _rename(tensors: dict[str, Any], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


DAMAGES = {
    "another version": (lambda h, t: h.update(schema_version=2), "schema_version is 2; this version reads 1"),
    "no trace": (lambda h, t: t["__metadata__"].clear(), "holds tensors, and no trace; allowed"),
    "a field is missing": (lambda h, t: h.pop("texts"), "its header lacks 'texts'. Record it again"),
    "a field of another kind": (lambda h, t: h["layers"][0].update(window="wide"), r"its header.layers\[0\].window is"),
    "a tensor is missing": (lambda h, t: _rename(t, "layers.1.k", "x"), "tensor layers.1.k has shape None"),
    "a tensor of another shape": (lambda h, t: t["layers.0.v"]["shape"].reverse(), "tensor layers.0.v has shape"),
    "a position too many": (lambda h, t: h["positions"].append(9), "and 6 positions were kept"),
    "a text too few": (lambda h, t: h["texts"].pop(), "not every one of its 5 positions has a text"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_file_that_is_no_whole_trace_is_refused(what, tmp_path):
    change, told = DAMAGES[what]
    path = tmp_path / "trace"
    record(LLAMA.build(), words(5), spill=path)
    rewrite(path, lambda header, tensors: None)
    Trace.load(path)
    rewrite(path, change)
    with pytest.raises(UnsupportedInput, match=told):
        Trace.load(path)


@pytest.mark.parametrize("what", ["cut", "empty", "missing", "a text", "a folder"])
def test_a_file_that_is_no_whole_file_is_refused(what, tmp_path):
    path = tmp_path / "trace"
    if what == "a folder":
        path.mkdir()
    elif what != "missing":
        record(LLAMA.build(), words(5), spill=path)
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-1], "empty": b"", "a text": b"once upon a time"}[what])
    with pytest.raises(UnsupportedInput, match=r"cannot read .*; allowed: a whole file in safetensors format"):
        Trace.load(path)


def test_a_trace_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UnsupportedInput, match=r"cannot write .*No such file or directory"):
        record(LLAMA.build(), words(5), spill=tmp_path / "nowhere" / "trace")
