"""Rows of `bench_encode`: the reference is a contestant, and what is timed makes the records of a real cache."""

import time

import pytest
import torch

from occamkv.bench import Setting, Shape, bench_encode, encode
from occamkv.bench.encode import encoder
from occamkv.bench.scene import DTYPE, random_tokens, statistics_of
from occamkv.errors import UnsupportedInput
from occamkv.formats.records import decode, to_groups
from occamkv.kernels import backend, reference
from occamkv.methods import method

SHAPE = Shape("a", 4, 2, 32)
SETTING = Setting(methods=("occam",), repetitions=5, backend="reference")


@pytest.mark.parametrize("name", ["occam", "oscar", "turboquant", "kvarn", "occam_quality"])
def test_what_is_timed_takes_tokens_from_model_space_to_records(name):
    chosen = method(name)
    records = encoder(SHAPE, chosen, backend("reference"), 256)()
    drawn = random_tokens(SHAPE, 256, 1)
    crossing = chosen.crossing(drawn.k, statistics_of(chosen, SHAPE))
    found = decode(records, format=chosen.packed_format, head_dim=32)
    for made, given in zip(found, crossing.enter(drawn.k.to(DTYPE), drawn.v.to(DTYPE)), strict=True):
        wanted = to_groups(given, chosen.packed_format.record_tokens)
        assert torch.nn.functional.cosine_similarity(made.flatten(), wanted.flatten(), dim=0) > 0.9


def test_rates_belong_to_the_times():
    rows = bench_encode([SHAPE, Shape("b", 1, 1, 8)], SETTING, tokens=128)
    assert [(row["shape"], row["method"], row["threads"], row["tokens"]) for row in rows] == [
        (shape, "occam", 1, 128) for shape in "ab"
    ]
    for row in rows:
        ms = {name: entry["cpu_ms"] for name, entry in row["contestants"].items()}
        assert set(ms) == {"ours", "reference"}
        assert row["ours_tokens_per_s"] == pytest.approx(128_000 / ms["ours"])
        assert row["reference_tokens_per_s"] == pytest.approx(128_000 / ms["reference"])
        assert row["ratio_reference"] == pytest.approx(ms["reference"] / ms["ours"])


def test_a_slowed_backend_is_reported_slower(monkeypatch):
    def slow(*args, **kwargs):
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        return reference.encode(*args, **kwargs)

    class Slow:
        name = "slow"
        encode = staticmethod(slow)

    monkeypatch.setattr(encode, "backend_of", lambda chosen, name: Slow())
    (row,) = bench_encode([SHAPE], SETTING, tokens=128)
    assert row["backend"] == "slow"
    assert row["ratio_reference"] < 0.5


@pytest.mark.parametrize("tokens", [0, 100, -128, 2**15])
def test_a_number_of_tokens_that_makes_no_pages_is_refused(tokens):
    with pytest.raises(UnsupportedInput, match=f"tokens is {tokens}; allowed: a multiple of 128"):
        bench_encode([SHAPE], SETTING, tokens=tokens)
