"""What result files say about the command that made them, and how `run` tells the memory of the process."""

import sys

import pytest

from occamkv.cli.conditions import conditions
from occamkv.cli.run import _growth


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
