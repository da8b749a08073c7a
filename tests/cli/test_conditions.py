"""What result files say about the command that made them, and how `run` tells the memory of the process."""

import sys

import pytest
import torch

from occamkv.cli.conditions import conditions
from occamkv.cli.memory import Watch
from occamkv.cli.run import _growth, _memory


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/occamkv", "analyze", "a model"], "occamkv analyze 'a model'"),
        (["-c", "analyze", "m"], "occamkv analyze m"),
        ([""], "occamkv"),
        (["benchmarks/step.py", "m"], "python benchmarks/step.py m"),
    ],
)
def test_the_command_can_be_given_again(monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    assert conditions()["command"] == command


@pytest.mark.parametrize(
    ("nbytes", "told"), [(2**20, "1.00 MiB more"), (-(2**20), "1.00 MiB less"), (None, "not measured")]
)
def test_memory_that_shrank_is_not_more(nbytes, told):
    assert _growth(nbytes).startswith(told)


def test_on_a_gpu_its_peak_is_told(monkeypatch):
    reset, allocated = [], {"memory_allocated": 2**20, "max_memory_allocated": 3 * 2**20}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    for name, nbytes in allocated.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, nbytes=nbytes: nbytes)
    device = torch.device("cuda", 1)
    taken = Watch(device).read()
    assert reset == [device] and taken.gpu == {"before_bytes": 2**20, "peak_bytes": 3 * 2**20}
    told = _memory({"gpu_memory": taken.gpu, "rss_growth_bytes": 0})
    assert told == ("GPU memory", "3.00 MiB at most, 1.00 MiB before generating")
    assert Watch(torch.device("cpu")).read().gpu is None
