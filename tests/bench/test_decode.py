"""Rows of `bench_decode` on tiny random models: what is held, what is compared, who takes turns."""

import time

import pytest
import torch
from transformers import DynamicCache

import emulated_cuda
import saved_models
from occamkv import PackedCache, kernels
from occamkv.bench import Setting, bench_decode, decode
from occamkv.bench.decode import Prefill, greedy
from occamkv.errors import NothingQuantized, UnsupportedInput
from occamkv.integrations.transformers import attention

SETTING = {"contexts": (300,), "repetitions": 5}


def loaders(kind: str = "packable", dtypes=("float32",)):
    return {dtype: lambda dtype=dtype: saved_models.build(kind, dtype=getattr(torch, dtype)) for dtype in dtypes}


@pytest.fixture(scope="module")
def found():
    setting = Setting(**SETTING | {"contexts": (300, 200), "methods": ("occam", "kivi")})
    models = {"one": loaders(dtypes=("float32", "bfloat16")), "two": loaders("half sliding")}
    return bench_decode(models, setting, steps=2, prefill=Prefill((150,), 2))


def test_there_is_a_row_for_everything_that_was_asked(found):
    keys = [(row["shape"], row["dtype"], row["context"], row["method"]) for row in found.rows]
    both = [("one", "float32"), ("one", "bfloat16"), ("two", "float32")]
    assert keys == [(*of, context, name) for of in both for context in (200, 300) for name in ("occam", "kivi")]


def test_only_the_first_model_reads_prompts(found):
    keys = [(row["shape"], row["dtype"], row["context"], row["method"]) for row in found.prefill]
    assert keys == [("one", dtype, 150, name) for dtype in ("float32", "bfloat16") for name in ("occam", "kivi")]
    assert {entry["repetitions"] for row in found.prefill for entry in row["contestants"].values()} == {2}


def test_ratios_belong_to_the_times(found):
    for row in found.rows:
        assert row["ours_ms"] == row["contestants"]["ours"]["cpu_ms"]
        assert row["stock_ms"] == row["contestants"]["stock"]["cpu_ms"]
        assert row["ratio_enable_gqa"] == pytest.approx(row["stock_ms"] / row["ours_ms"])
        alike = [r for r in found.rows if (r["shape"], r["context"]) == (row["shape"], row["context"])]
        best = min(alike, key=lambda r: r["stock_ms"])
        assert row["best_stock"] == f"stock_{best['dtype']}"
        assert row["ratio_best_stock"] == pytest.approx(best["stock_ms"] / row["ours_ms"])


def test_bytes_are_those_of_the_filled_caches(found):
    for row in found.rows:
        if row["shape"] == "one":
            per_token = 2 * 2 * 2 * 32 * (2 if row["dtype"] == "bfloat16" else 4)
            assert row["stock_bytes"] == (row["context"] - 1) * per_token
            assert 0 < row["cache_bytes"] < row["stock_bytes"]


class Watch:
    """Notes which cache each forward pass reads, its length, and the attention that is switched on."""

    def __init__(self, monkeypatch, *, slow=None):
        self.seen = []

        def watched(model, cache, steps):
            kind = PackedCache if isinstance(cache, PackedCache) else DynamicCache
            self.seen.append((kind, cache.get_seq_length(), model.config._attn_implementation, cache))
            if kind is slow:
                end = time.thread_time() + 0.05 * steps
                while time.thread_time() < end:
                    pass
            return greedy(model, cache, steps)

        monkeypatch.setattr(decode, "greedy", watched)


def test_caches_take_turns_from_the_same_context_with_their_own_attention(monkeypatch):
    watch = Watch(monkeypatch)
    bench_decode({"m": loaders()}, Setting(**SETTING), steps=3)
    probe, *turns = [entry[:3] for entry in watch.seen]
    assert probe == (DynamicCache, 0, probe[2])
    expected = []
    for turn in range(6):
        expected += [(PackedCache, 299 + 3 * turn, attention.NAME), (DynamicCache, 299 + 3 * turn, "sdpa")]
    assert turns == expected


def test_the_packed_cache_is_packed_and_read_packed(monkeypatch):
    watch = Watch(monkeypatch)
    bench_decode({"m": loaders()}, Setting(**SETTING), steps=3)
    report = next(cache for kind, _, _, cache in watch.seen if kind is PackedCache).report()
    assert all(layer.packed_tokens >= 160 for layer in report.layers)
    assert {(layer.reads_packed, layer.reads_dense) for layer in report.layers} == {(18, 0)}


@pytest.mark.parametrize("slow", [PackedCache, DynamicCache])
def test_a_slowed_contestant_is_reported_slower(monkeypatch, slow):
    Watch(monkeypatch, slow=slow)
    (row,) = bench_decode({"m": loaders()}, Setting(**SETTING), steps=1).rows
    assert row["ours_ms" if slow is PackedCache else "stock_ms"] > 49
    assert (row["ratio_enable_gqa"] > 2, row["ratio_enable_gqa"] < 0.5) == (slow is DynamicCache, slow is PackedCache)


def test_one_model_is_held_at_a_time():
    import weakref

    held: list[weakref.ref] = []

    def load():
        assert not any(reference() is not None for reference in held)
        model = saved_models.build("packable")
        held.append(weakref.ref(model))
        return model

    bench_decode({"a": {"float32": load}, "b": {"float32": load}}, Setting(**SETTING), steps=1)
    assert len(held) == 2


@pytest.mark.parametrize(
    ("error", "kind", "options", "words"),
    [
        pytest.param(NothingQuantized, "all sliding", {}, "no layer of this", id="all sliding"),
        pytest.param(UnsupportedInput, "packable", {"steps": 0}, "steps are '0'", id="no steps"),
        pytest.param(UnsupportedInput, "packable", {"contexts": (100,)}, "context 100", id="nothing packed"),
        pytest.param(UnsupportedInput, "packable", {"prefill": Prefill((1,))}, "prefill contexts", id="prompt of one"),
        pytest.param(UnsupportedInput, "packable", {"prefill": Prefill((150,), 0)}, "repetitions", id="no prefill"),
    ],
)
def test_what_cannot_be_measured_is_refused(error, kind, options, words):
    setting = Setting(**SETTING | {key: options[key] for key in options if key == "contexts"})
    rest = {"steps": 1} | {key: value for key, value in options.items() if key != "contexts"}
    with pytest.raises(error, match=words):
        bench_decode({"m": loaders(kind)}, setting, **rest)


def test_a_backend_that_was_asked_for_writes_pages_in_its_own_order():
    """The cache of a model on a CPU would take a backend of the CPU by itself."""
    cache = PackedCache(saved_models.build("packable"), "oscar")
    with emulated_cuda.on_cpu():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "BACKENDS", ("reference",))
            decode.fill(cache, [(2, 32)] * 2, 200, dtype=torch.float32, backend="cuda")
        store = cache.layers[0].cache.store
        assert {slab.order for slab in store.pool.slabs} == {"cuda-1"}
        store.read(0)
