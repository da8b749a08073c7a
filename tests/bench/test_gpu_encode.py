"""`bench_gpu_encode` on a CPU with a made-up clock."""

import pytest

from occamkv.bench import Shape
from occamkv.bench.gpu_ceilings import Ceilings
from occamkv.bench.gpu_encode import bench_gpu_encode
from occamkv.errors import UnsupportedInput
from some_gpu_rig import cpu_rig

SHAPE = Shape("4/2/32", 4, 2, 32)
CEILINGS = Ceilings(read_gb_per_s=100.0, copy_gb_per_s=50.0)


def test_bytes_are_those_read_and_written():
    rig = cpu_rig(l2_bytes=2**16)
    rows = bench_gpu_encode([SHAPE], ("oscar", "occam"), rig, CEILINGS, tokens=256, repetitions=5)
    assert [row["method"] for row in rows] == ["oscar", "occam"]
    for row, bits in zip(rows, (3.5, 2.75), strict=True):  # 64 values of K a token share a norm, 4 or 2 bytes
        assert row["read_bytes"] == 256 * 2 * 2 * 32 * 2
        assert row["written_bytes"] == pytest.approx(256 * 2 * 2 * 32 * bits / 8, rel=0.1)
        assert row["gb_per_s"] == pytest.approx((row["read_bytes"] + row["written_bytes"]) / 1e6)
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / 50)
        assert row["ours_tokens_per_s"] == 256_000
        assert row["copies"] == 3
    assert rig.queued.rotations == [12, 12]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 100}, "tokens is 100"),
        ({"tokens": 2**19}, "tokens is"),
        ({"repetitions": 1}, "repetitions is 1"),
        ({"methods": ()}, "methods are ''"),
        ({"methods": ("occam", "occam")}, "methods are 'occam, occam'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    given = {"methods": ("occam",), "tokens": 256, "repetitions": 5} | options
    with pytest.raises(UnsupportedInput, match=words):
        bench_gpu_encode([SHAPE], rig=cpu_rig(), ceilings=CEILINGS, **given)
