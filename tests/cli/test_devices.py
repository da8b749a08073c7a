"""Commands on a device that is not the CPU: what is made on the wrong one would be noticed (see `pretend_device`)."""

import pytest
import torch

import pretend_device
import saved_models
from occamkv.cache import chooser
from pretend_device import NAME

ANSWERS = ("--windows", 1, "--length", 300, "--first-token", 0, "--score-from", 200, "--generated", 4, "--prompt", 200)
PROBES = ("--probes", 1, "--probe-lengths", 200, "--probe-depths", 0.5)
COMMANDS = {
    "run": ("run", "--max-new-tokens", 6),
    "run-receipt": ("run", "--max-new-tokens", 6, "--receipt", "r.json"),
    "run-window": ("run", "--max-new-tokens", 6, "--window", 256),
    "run-detected": ("run", "--max-new-tokens", 6, "--pins", "detected"),
    "run-auto": ("run", "--max-new-tokens", 6, "--method", "auto_b3.5"),
    "run-full": ("run", "--max-new-tokens", 6, "--method", "full"),
    "eval": ("eval", "--method", "occam,turboquant", *ANSWERS, *PROBES, "--json", "e.json"),
    "analyze": ("analyze", "--tokens", 256, "--save-trace", "t.safetensors"),
}


@pytest.fixture
def on_device(occamkv, folder_of, tmp_path, monkeypatch):
    """Run a command with a tiny model on the device."""
    monkeypatch.chdir(tmp_path)
    words = saved_models.text(2000).split()
    (tmp_path / "prose.txt").write_text(" ".join(w if i % 12 else f"{w}. W5" for i, w in enumerate(words)))
    (tmp_path / "prompt.txt").write_text(saved_models.text(300))

    def run(verb, *args, kind):
        text = ("--prompt-file", "prompt.txt") if verb == "run" else ("--text", "prose.txt")
        with pretend_device.present():
            return occamkv(verb, folder_of(kind), *text, *args, "--device", NAME)

    return run


FAST = ("run-receipt", "analyze")


@pytest.mark.parametrize("kind", ["packable", pytest.param("half sliding", marks=pytest.mark.emulator)])
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.emulator) for n in COMMANDS])
def test_nothing_is_made_on_the_wrong_device(name, kind, on_device):
    done = on_device(*COMMANDS[name], kind=kind)
    assert done.code == 0, done.err


def test_twin_a_tensor_on_the_wrong_device_is_noticed(on_device, monkeypatch):
    made = chooser.Sample
    monkeypatch.setattr(chooser, "Sample", lambda q, at, *rest: made(q, torch.tensor(at.tolist()), *rest))
    with pytest.raises(RuntimeError, match="on the CPU"):
        on_device(*COMMANDS["run-auto"], kind="packable")
