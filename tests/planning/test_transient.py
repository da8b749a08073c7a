"""What reading a prompt takes at its peak is measured: every storage is counted while layers take tokens."""

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, MistralConfig

from integrations.tiny import SIZES
from occamkv import PackedCache
from occamkv.integrations.transformers import plan_for
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.sizes import read_sizes
from occamkv.planning import Workload, estimate
from storage_meter import StorageMeter

HEADS, HEAD_DIM = SIZES["num_key_value_heads"], SIZES["head_dim"]
WINDOW = {"sliding_window": 100, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}


def config_of(kind: str):
    if kind == "windows alone":
        return MistralConfig(**{**SIZES, "num_hidden_layers": 3, "sliding_window": 100})
    if kind == "windows":
        return Gemma3TextConfig(**{**SIZES, **WINDOW, "num_hidden_layers": 3})
    return LlamaConfig(**{**SIZES, "num_hidden_layers": 3})


def peak(cache, load: Workload) -> int:
    """Feed a prompt as a model does: each layer's K and V live until the next layer's are made."""
    with StorageMeter() as meter:
        for first in range(0, load.context, load.step):
            count = min(load.step, load.context - first)
            for index, layer in enumerate(cache.layers):
                k = torch.randn(load.batch, HEADS, count, HEAD_DIM)
                v = torch.randn(load.batch, HEADS, count, HEAD_DIM)
                cache.update(k, v, index)
                if isinstance(layer, PackedLayer):
                    layer.cache.settle()  # as the attention function does
                del k, v
    return meter.peak


@pytest.mark.parametrize("kind", ["full attention", "windows", "windows alone"])
@pytest.mark.parametrize("chunk", [None, 256])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_full_cache_peaks_where_it_was_planned(kind, chunk, batch):
    config, load = config_of(kind), Workload(1024, batch, chunk)
    need = estimate(read_sizes(config, dtype="float32"), plan_for(config, "full"), load)
    found = peak(DynamicCache(config=config), load)
    assert found == pytest.approx(need.peak, rel=0.001)  # a window notes its length in a tensor


@pytest.mark.parametrize("kind", ["full attention", "windows"])
@pytest.mark.parametrize("chunk", [None, 1024])
def test_a_packed_cache_peaks_where_it_was_planned_but_for_the_encoders_workspace(kind, chunk):
    config, load = config_of(kind), Workload(8192, 1, chunk)
    need = estimate(read_sizes(config, dtype="float32"), plan_for(config, "oscar"), load)
    found = peak(PackedCache(config, "oscar"), load)
    slice_bytes = 2**18 * 4
    assert need.peak <= found <= need.peak + 12 * slice_bytes
