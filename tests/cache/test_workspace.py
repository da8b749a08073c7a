"""A large batch of a large model is read in pieces too."""

import pytest
import torch

from occamkv.cache import LayerCache
from occamkv.methods import method
from storage_meter import StorageMeter


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_decoding_a_batch_takes_less_than_16_mib(batch):
    cache = LayerCache(method("oscar", pins="first:4"))
    k = torch.randn(batch, 8, 400, 128)
    cache.update(k, k)
    cache.settle()
    cache.update(k[:, :, :1], k[:, :, :1])
    with StorageMeter() as meter:
        cache.attend(torch.randn(batch, 32, 1, 128))
    assert 2**20 < meter.peak < 16 * 2**20
