"""For all tests: one thread. Tensors are small, and on a busy machine a second thread costs more than it gives."""

import pytest
import torch

from occamkv import kernels

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Skip what needs a GPU where there is none; whoever asks for nothing else (`-m gpu`) is told that it failed."""
    if not torch.cuda.is_available():
        if config.option.markexpr == "gpu":
            raise pytest.UsageError("torch finds no NVIDIA GPU here, so no test marked gpu was run")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="torch finds no NVIDIA GPU here"))


@pytest.fixture
def reference_only(monkeypatch):
    """Caches take the reference: what it reads differs from plain attention by the rounding of float32 alone."""
    monkeypatch.setattr(kernels, "BACKENDS", ("reference",))
