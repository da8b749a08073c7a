"""Find and load a model: a folder, a GGUF file, a hub id, or one of the models that come as Python packages."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import struct
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from occamkv.errors import UnsupportedInput, UnsupportedModel
from occamkv.methods.names import nearest


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder or hub id, and the GGUF file in it if there is one."""

    where: str
    gguf_file: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def packaged_models() -> dict[str, dict[str, str]]:
    """Return the models that come as Python packages, by short name."""
    return _data()["packaged"]


def random_models() -> dict[str, dict[str, Any]]:
    """Return configurations of models that are measured with random weights on a CPU, by name."""
    return _data()["random"]


def random_gpu_models() -> dict[str, dict[str, Any]]:
    """Return those of models that are too large for that."""
    return _data()["random_gpu"]


def build_random(name: str, *, dtype: str, seed: int, device: str = "cpu") -> Any:
    """Build a model of these with random weights, right on a device, for measurements of speed: no download."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**(random_gpu_models() | random_models())[name])
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def attention_shapes() -> dict[str, tuple[int, int, int]]:
    """Return (query heads, KV heads, head_dim) of well-known models, by name."""
    return {name: tuple(numbers) for name, numbers in _data()["shapes"].items()}


def _data() -> Any:
    return json.loads(files("occamkv.cli").joinpath("models.json").read_text("utf-8"))


def find(name: str) -> Source:
    """Return where a model lies.

    Raises:
        UnsupportedModel: The package or file is missing or broken; the message says what to do.
    """
    known = packaged_models()
    if name in known:
        return _packaged(name, known[name])
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        _check_gguf(path)
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModel(
                f"{name!r} is a folder without config.json; allowed: a folder that save_pretrained made."
            )
        return Source(str(path))
    if "/" in name and not name.startswith((".", "/", "~")):
        return Source(name)
    raise UnsupportedModel(
        f"no model {name!r}{nearest(name, known)} Allowed: a folder, a .gguf file, a hub id (owner/name), "
        f"or one of {', '.join(known)}."
    )


def _packaged(name: str, entry: dict[str, str]) -> Source:
    spec = importlib.util.find_spec(entry["module"])
    if spec is None or spec.origin is None:
        raise UnsupportedModel(f"the package with {name} ({entry['about']}) is not installed. Run: {entry['install']}")
    if "assemble" in entry:
        path = Path(getattr(import_module(entry["module"]), entry["assemble"])())
    else:
        matches = sorted(Path(spec.origin).parent.glob(entry["file"]))
        if not matches:
            raise UnsupportedModel(
                f"the package with {name} holds no {entry['file']}. Run: {entry['install']} --force-reinstall"
            )
        path = matches[0]
    _check_gguf(path)
    return Source(str(path.parent), path.name)


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise UnsupportedModel(f"cannot read the model file {str(path)!r}: {error.strerror}.") from error
    if len(head) < 24 or head[:4] != b"GGUF":
        raise UnsupportedModel(
            f"{str(path)!r} is no GGUF file (it starts with {head[:4]!r}, not b'GGUF'). Download or install it again."
        )
    version, tensors = struct.unpack("<IQ", head[4:16])
    if version not in (2, 3) or not tensors:
        raise UnsupportedModel(
            f"{str(path)!r} is GGUF version {version} with {tensors} tensors; allowed: version 2 or 3, and tensors."
        )


def config_of(name: str) -> tuple[Any, list[str]]:
    """Return the configuration of a model, or of a config.json, and what was assumed; no weights are read.

    Raises:
        UnsupportedInput: There is no such file, or it lacks what nothing can be said without.
        UnsupportedModel: There is no such model, or transformers cannot read its configuration.
    """
    from occamkv.integrations.transformers.configuration import read_config

    path = Path(name).expanduser()
    if path.suffix == ".json":
        if not path.is_file():
            raise UnsupportedInput(f"there is no file {name!r}; allowed: a config.json, or the name of a model.")
        return read_config(path)
    found = find(name)
    return read_config(found.where, **found.options)


def load(name: str, *, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Load model and tokenizer.

    Args:
        name: See `find`.
        device: A torch device.
        dtype: "auto" (bfloat16), "float32", "bfloat16" or "float16".

    Raises:
        UnsupportedModel: There is no such model, or transformers cannot read it.
        UnsupportedInput: Device or dtype do not exist here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    source = find(name)
    dtypes = {"auto": torch.bfloat16, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise UnsupportedInput(f"dtype is {dtype!r}; allowed: {', '.join(dtypes)}.")
    where = _device(device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # loading draws bars of its own
            tokenizer = AutoTokenizer.from_pretrained(source.where, **source.options)
            options = {**source.options, **_gguf_options(source)}
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.where, dtype=dtypes[dtype], output_loading_info=True, **options
            )
    except Exception as error:  # a damaged file can make its reader raise anything
        _check_config(source)
        raise UnsupportedModel(_not_loaded(name, source, error)) from error
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        _check_config(source)
        raise UnsupportedModel(
            f"{name!r} lacks {len(missing)} weights of this model, such as {min(missing)!r}. Download it again."
        )
    return model.to(where).eval(), tokenizer


def check_tokens(model: Any, ids: Any) -> None:
    """Raise `UnsupportedModel` if a tokenizer made tokens, `[1, T]`, that the model does not know."""
    known = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and int(ids.max()) >= known:
        raise UnsupportedModel(
            f"the tokenizer made token {int(ids.max())}, the model knows {known}. Use the model's own tokenizer."
        )


def _check_config(source: Source) -> None:
    """Raise `UnsupportedInput` if a model could not be loaded because its config.json lacks a field; name that."""
    from occamkv.integrations.transformers.configuration import read_config

    if source.gguf_file is None and (Path(source.where) / "config.json").is_file():
        with contextlib.suppress(UnsupportedModel):  # which transformers itself has said
            read_config(source.where)


def _not_loaded(name: str, source: Source, error: Exception) -> str:
    """Say why transformers could not load a model, in one line, and what to do."""
    told = " ".join(str(error).split()).partition(" Model type should be one of")[0][:300] or type(error).__name__
    if not Path(source.where).exists():
        return f"transformers cannot load {name!r}: {told} Run: hf download {name}"
    return (
        f"transformers cannot load {name!r}: {told.rstrip('.')}. Allowed: a whole causal language model with its "
        "tokenizer, of an architecture that this version of transformers reads."
    )


def _gguf_options(source: Source) -> dict[str, Any]:
    """Ask for plain weights where this version of transformers could also keep them in GGUF blocks."""
    import transformers

    if source.gguf_file is None or not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise UnsupportedInput(
            f"device {name!r} cannot be used here: {told}. `occamkv doctor` lists what is there."
        ) from error
    return device
