"""A large batch of a large model is read in pieces too."""

import pytest
import torch

from occamkv import kernels
from occamkv.cache import LayerCache
from occamkv.methods import method
from some_attention import AVAILABLE
from storage_meter import StorageMeter


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_decoding_a_batch_takes_less_than_16_mib(backend, batch, monkeypatch):
    monkeypatch.setattr(kernels, "BACKENDS", (backend,))
    cache = LayerCache(method("oscar", pins="first:4"))
    k = torch.randn(batch, 8, 400, 128)
    cache.update(k, k)
    cache.settle()
    cache.update(k[:, :, :1], k[:, :, :1])
    with StorageMeter() as meter:
        cache.attend(torch.randn(batch, 32, 1, 128))
    assert meter.peak < 16 * 2**20
    assert backend != "reference" or meter.peak > 2**20, "the meter sees what the reference dequantizes"
