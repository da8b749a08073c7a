"""Configurations of well-known models, and answers that are known from elsewhere."""

import functools
from pathlib import Path

import pytest

from occamkv.cache.sizes import ModelSizes
from occamkv.errors import NothingQuantized
from occamkv.integrations.transformers import plan_for
from occamkv.integrations.transformers.configuration import read_config
from occamkv.integrations.transformers.sizes import read_sizes
from occamkv.planning import Need, Workload, estimate, largest_batch, longest_context
from occamkv.planning.result import weight_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PARAMETERS = {  # of the published checkpoints; the last without its module for multi-token prediction
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-3-27b": 27_432_406_640,
    "gpt-oss-20b": 20_914_757_184,
    "deepseek-v3": 671_026_404_352,
}


@functools.cache
def model(name: str) -> tuple[object, ModelSizes]:
    config, _ = read_config(CONFIGS / f"{name}.json")
    return config, read_sizes(config)


def need(name: str, method: str, tokens: int, **load) -> Need:
    config, sizes = model(name)
    return estimate(sizes, plan_for(config, method), Workload(tokens, **load))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_those_of_the_published_weights(name):
    sizes = model(name)[1]
    assert sizes.parameters == PARAMETERS[name]
    assert sizes.weight_bytes == 2 * PARAMETERS[name]


def test_a_full_cache_of_128k_tokens_takes_16_gib():
    assert need("llama-3.1-8b", "full", 131072).cache == 16 * 2**30


@pytest.mark.parametrize(("tokens", "ratio"), [(1023, 3.45), (4095, 4.68), (32767, 5.22), (131071, 5.28)])
def test_the_ratio_grows_with_the_context(tokens, ratio):
    """With a full residual; one token more opens a page."""
    full, packed = (need("llama-3.1-8b", method, tokens).cache for method in ("full", "oscar"))
    assert full / packed == pytest.approx(ratio, abs=0.006)


def test_3_bits_per_value_and_a_norm_per_token():
    """32 layers, 1024 pages of 128 tokens: 8 heads, four records of 24 * 128 bytes each, and 128 norms of 4 bytes."""
    assert need("llama-3.1-8b", "oscar", 131072).records == 32 * 1024 * (8 * 4 * 24 * 128 + 128 * 4)


def test_windows_keep_their_last_tokens():
    sizes = model("gemma-3-27b")[1]
    assert len(sizes.layers) == 62
    assert sum(layer.most_tokens is None for layer in sizes.layers) == 10
    assert need("gemma-3-27b", "full", 131072).cache == (10 * 131072 + 52 * 1023) * 2 * 16 * 128 * 2
    assert len({layer.most_tokens for layer in model("gpt-oss-20b")[1].layers[::2]} - {127}) == 0


def test_a_prompt_in_pieces_spares_what_windows_are_cut_out_of():
    whole, pieces = (need("gemma-3-27b", "oscar", 131072, chunk=chunk) for chunk in (None, 2048))
    assert whole.cache == pieces.cache
    one_layer = 131072 * 2 * 16 * 128 * 2
    assert whole.transient == 52 * (one_layer - 1023 * 2 * 16 * 128 * 2) + one_layer
    assert pieces.transient < 2**30 < 50 * 2**30 < whole.transient


def test_latent_attention_is_counted_as_it_is_cached_and_refused_for_packing():
    layer = model("deepseek-v3")[1].layers[0]
    assert (layer.k_heads, layer.k_dim, layer.v_heads, layer.v_dim) == (1, 512, 1, 64)
    assert need("deepseek-v3", "full", 131072).cache == 61 * 131072 * (512 + 64) * 2
    with pytest.raises(NothingQuantized):
        plan_for(model("deepseek-v3")[0], "oscar")


def test_a_window_in_every_layer_leaves_nothing_to_pack():
    with pytest.raises(NothingQuantized, match="4096"):
        plan_for(model("mistral-7b-v0.1")[0], "oscar")
    assert need("mistral-7b-v0.1", "full", 131072).cache == 32 * 4095 * 2 * 8 * 128 * 2
    assert need("mistral-7b-v0.3", "full", 131072).cache == 16 * 2**30


@pytest.mark.parametrize("method", ["full", "occam", "oscar", "auto"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b"])
def test_what_fits_fits_and_one_more_does_not(name, method):
    config, sizes = model(name)
    plan, load, room = plan_for(config, method), Workload(4096, batch=2), 3 * 2**30
    longest, batch = longest_context(sizes, plan, load, room), largest_batch(sizes, plan, load, room)
    for fitting, more in (
        (load.with_context(longest), load.with_context(longest + 1)),
        (load.with_batch(batch), load.with_batch(batch + 1)),
    ):
        assert estimate(sizes, plan, fitting).peak <= room < estimate(sizes, plan, more).peak


def test_nothing_fits_into_no_room():
    config, sizes = model("qwen3-8b")
    assert longest_context(sizes, plan_for(config, "occam"), Workload(1), -1) == 0


def test_quantized_weights_keep_embeddings_and_head():
    sizes = model("llama-3.1-8b")[1]
    embeddings, vectors = 2 * 128256 * 4096, 65 * 4096
    assert sizes.matrix_parameters == sizes.parameters - embeddings - vectors
    assert weight_bytes(sizes, bits=4) == 2 * (embeddings + vectors) + sizes.matrix_parameters // 2
    assert weight_bytes(sizes, bits=16) == weight_bytes(sizes) == sizes.weight_bytes
