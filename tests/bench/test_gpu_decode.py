"""`bench_gpu_decode` on tiny models on a CPU: which caches step, how full they are, what is compared and left out."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import saved_models
import some_gpu_rig
from occamkv import PackedCache
from occamkv.bench import gpu_capacity, gpu_decode, gpu_timing
from occamkv.bench.gpu_decode import GpuDecodeSetting, ModelSteps, bench_gpu_decode
from occamkv.errors import UnsupportedInput
from occamkv.integrations.transformers import attention
from some_gpu_rig import cpu_rig, eager_steps

__all__ = ["eager_steps"]
pytestmark = [pytest.mark.usefixtures("eager_steps"), pytest.mark.emulator]

SETTING = {
    "contexts": (400, 300),
    "batches": (3, 2),
    "batch_contexts": (300,),
    "prefill_contexts": (200,),
    "methods": ("occam",),
    "steps": 2,
}
MARGIN = 2**32


@pytest.fixture(scope="module")
def model():
    return saved_models.build("packable")


def ms_of(call):
    return 2.0 if "EagerStep" in str(call) or "PackedCache" in str(call) else 5.0


@pytest.fixture(scope="module")
def found(model, eager_steps):
    return bench_gpu_decode(model, GpuDecodeSetting(**SETTING), cpu_rig(memory_bytes=MARGIN + 2**21, ms_of=ms_of))


def test_batch_one_and_larger_batches_take_turns_in_order_of_value(found):
    assert [(row["context"], row["batch"]) for row in found["rows"]] == [(400, 1), (300, 3), (300, 1), (300, 2)]
    assert [(row["context"], row["method"]) for row in found["prefill"]] == [(200, "occam")]
    assert found["dropped"] == []


def test_ratios_and_speeds_belong_to_the_times(found):
    for row in (*found["rows"], *found["prefill"]):
        tokens = 200 if row in found["prefill"] else row["batch"]
        assert (row["ours_ms"], row["stock_ms"], row["ratio"]) == (2.0, 5.0, 2.5)
        assert row["ours_tokens_per_s"] == 500 * tokens
        assert row["stock_tokens_per_s"] == 200 * tokens


def test_bytes_are_those_of_the_caches(found, model):
    per_token = 2 * 2 * 2 * 32 * 4  # layers, K and V, heads, channels, float32
    for row in found["rows"]:
        assert row["stock_bytes"] == row["batch"] * row["context"] * per_token
        assert 0 < row["cache_bytes"] < row["stock_bytes"]


def test_computed_bytes_are_those_of_a_filled_cache(model, monkeypatch):
    monkeypatch.setattr(gpu_decode, "_PIECE", 600)
    monkeypatch.setattr(gpu_decode, "_LEAST_PIECE", 100)
    steps = ModelSteps(model, cpu_rig(), GpuDecodeSetting(**SETTING))
    (one,) = steps.setting.chosen
    cache = PackedCache(model, one)
    steps._fill(cache, 700, 3)
    assert cache.nbytes() == steps.packed_bytes(one, 700, 3)
    assert len(cache.layers[0].cache.store.pool.slabs) == 2


class Watch:
    """Notes the cache, its length and the attention of every step of the model, and the visible tokens."""

    def __init__(self, model, monkeypatch):
        self.seen = []
        forward = type(model).forward

        def watched(module, *args, past_key_values=None, **kwargs):
            length = int(past_key_values.get_seq_length())
            self.seen.append((type(past_key_values), length, module.config._attn_implementation))
            return forward(module, *args, past_key_values=past_key_values, **kwargs)

        monkeypatch.setattr(type(model), "forward", watched)


def test_every_entrant_steps_with_its_own_attention_from_a_full_cache(model, monkeypatch):
    steps = ModelSteps(model, cpu_rig(), GpuDecodeSetting(**SETTING))
    watch = Watch(model, monkeypatch)
    gpu_decode._rows(steps, 300, 1)
    static = {entry for entry in watch.seen if entry[0] is StaticCache}
    assert static == {(StaticCache, 268, name) for name in ("sdpa", "static_math")}
    packed = [entry for entry in watch.seen if entry[0] is PackedCache]
    assert {name for _, _, name in packed} == {attention.NAME}
    lengths = [length for _, length, _ in packed]
    assert lengths == list(range(286, 286 + len(lengths)))
    assert lengths[-1] < 300


def test_unmasked_static_attention_reads_all_slots(model):
    steps = ModelSteps(model, cpu_rig(), GpuDecodeSetting(**SETTING))
    gpu_decode._unmasked(steps.rig)
    cache = StaticCache(config=model.config, max_cache_len=64)
    steps._fill(cache, 64, 2)
    q = torch.randn(2, 4, 1, 32, generator=torch.Generator().manual_seed(0))
    k, v = cache.layers[0].keys, cache.layers[0].values
    attend = gpu_decode.AttentionInterface._global_mapping["static_math"]
    out, _ = attend(None, q, k, v, None, scaling=32**-0.5)
    weights = (q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2) * 32**-0.5).softmax(-1)
    assert torch.allclose(out, (weights @ v[:, :, None]).flatten(1, 2).transpose(1, 2), atol=1e-5)


def test_prompts_are_read_by_a_packed_and_a_dynamic_cache(model, monkeypatch):
    steps = ModelSteps(model, cpu_rig(), GpuDecodeSetting(**SETTING))
    watch = Watch(model, monkeypatch)
    gpu_decode._prefill_rows(steps, 200)
    assert set(watch.seen) == {(DynamicCache, 0, "sdpa"), (PackedCache, 0, attention.NAME)}


def test_what_the_budget_does_not_reach_is_left_out_and_named(model, monkeypatch):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu_timing, "monotonic", lambda: next(seconds))
    found = bench_gpu_decode(model, GpuDecodeSetting(**SETTING, budget_seconds=25), cpu_rig())
    assert [(row["context"], row["batch"]) for row in found["rows"]] == [(400, 1), (300, 3)]
    used = "the budget of 25 s was used up"
    assert found["dropped"] == [
        *(f"rows {what}: {used}" for what in ("300, 1",)),
        f"prefill 200: {used}",
        f"rows 300, 2: {used}",
        *(f"tried 300, {what}: {used}" for what in ("occam", "None")),
    ]
    assert len(found["capacity"]) == 2


def test_caches_that_do_not_fit_beside_the_weights_are_left_out(model):
    found = bench_gpu_decode(model, GpuDecodeSetting(**SETTING), cpu_rig(memory_bytes=2**20))
    assert all("beside the weights" in told or "not one sequence" in told for told in found["dropped"])
    assert {row["batch"] for row in found["rows"]} == {1}


def test_the_largest_batch_is_computed_for_each_memory(found, model):
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert found["weight_bytes"] == weights
    assert [row["method"] for row in found["capacity"]] == ["occam", gpu_capacity.STATIC_CACHE]
    for row in found["capacity"]:
        for gib, batch in row["batch_by_gib"].items():
            left = int(gib) * 2**30 - weights
            assert batch * row["sequence_bytes"] <= left < (batch + 1) * row["sequence_bytes"]


def test_the_largest_batch_is_tried_on_what_is_there(found):
    ours, stock = found["tried"]
    assert (ours["method"], stock["method"]) == ("occam", gpu_capacity.STATIC_CACHE)
    assert ours["batch"] > stock["batch"] > 1
    for row, ms in ((ours, 2.0), (stock, 5.0)):
        assert row["cache_bytes"] + row["weight_bytes"] <= 2**21
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / ms)


def test_less_is_tried_where_memory_runs_out(model, monkeypatch, eager_steps):
    batches = []

    class Full(some_gpu_rig.EagerStep):
        def __init__(self, model, cache, *, steps):
            super().__init__(model, cache, steps=steps)
            batches.append(cache.layers[0].cache.store.residual_k.shape[0])
            if len(batches) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(eager_steps, "CapturedStep", Full)
    steps = ModelSteps(model, cpu_rig(memory_bytes=MARGIN + 2**22), GpuDecodeSetting(**SETTING))
    (row,) = gpu_capacity.tried(steps, 300, steps.setting.chosen[0])
    assert row["batch"] == batches[2] < batches[1] < batches[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"contexts": (0,)}, "contexts", id="no tokens"),
        pytest.param({"batch_contexts": (2**18,)}, "batch contexts", id="too long"),
        pytest.param({"batches": (1,)}, "batches", id="batch of one"),
        pytest.param({"steps": 0}, "steps", id="no steps"),
        pytest.param({"prefill_contexts": (1,)}, "prefill contexts", id="prompt of one"),
        pytest.param({"repetitions": 1}, "repetitions", id="few repetitions"),
        pytest.param({"contexts": (100,)}, "context 100", id="nothing packed"),
        pytest.param({"repetitions": 100}, "context 300", id="more steps than tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, words):
    with pytest.raises(UnsupportedInput, match=words):
        GpuDecodeSetting(**SETTING | changes)
