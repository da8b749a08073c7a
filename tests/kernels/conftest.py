"""What all kernel tests share: memory that a backend forgets to fill reads as NaN."""

import pytest
import torch

from occamkv.kernels.cpu import library


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Make fresh uninitialized float tensors NaN, so that an output that was not written shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def backend(request):
    """The name of a backend; with "cpu-avx2" as the parameter the CPU's, with that instruction set."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    before = library.isa()
    library.select(isa)
    yield name
    library.select(before)
