"""What a report says in words and in numbers."""

import json

from occamkv.cache import CacheReport, LayerReport


def packed(index: int, **changes) -> LayerReport:
    numbers = {
        "method": "oscar",
        "backend": "reference",
        "bits_per_value": 3.083,
        "tokens": 4096,
        "packed_tokens": 4096,
        "packed_bytes": 600_000,
        "residual_bytes": 100_000,
        "pin_bytes": 1_000,
        "full_bytes": 3_000_000,
        "reads_packed": 5,
    }
    return LayerReport(index, **numbers | changes)


def full(index: int, reason: str | None = "a sliding window of 512 tokens") -> LayerReport:
    return LayerReport(index, "full", reason, tokens=4096, residual_bytes=200_000, full_bytes=200_000)


def test_a_prompt_that_is_too_short_says_so():
    short = packed(0, tokens=57, packed_tokens=0, packed_bytes=0)
    report = CacheReport((short, packed(1, tokens=57, packed_tokens=0, packed_bytes=0)))
    assert "nothing packed yet: 57 tokens, packing starts at 128" in str(report).splitlines()
    assert not report.quantized


def test_a_cache_that_holds_packed_tokens_does_not_say_so():
    report = CacheReport((packed(0), packed(1, packed_tokens=0)))
    assert "nothing packed" not in str(report)
    assert report.quantized


def test_layers_that_are_alike_share_a_line():
    report = CacheReport((full(0), packed(1), packed(2), packed(3), full(4)))
    lines = str(report).splitlines()
    assert lines[:3] == [
        "layer 0: full precision, 0.19 MiB (a sliding window of 512 tokens)",
        "layers 1-3: oscar, 3.08 bits per value, 4096 tokens, 2.01 MiB, backend reference",
        "layer 4: full precision, 0.19 MiB (a sliding window of 512 tokens)",
    ]
    assert lines[3] == "all layers: 2.39 MiB held, 8.96 MiB in full precision, 3.76x smaller"
    assert len(lines) == 4


def test_layers_that_differ_have_their_own_lines():
    kinds = [packed(0), packed(1, method="kivi"), packed(2, method="kivi", backend="cpu"), full(3), full(4, "no room")]
    assert len(str(CacheReport(tuple(kinds))).splitlines()) == 6


def test_bytes_are_sums():
    report = CacheReport((full(0), packed(1), packed(2)))
    assert report.nbytes == 200_000 + 2 * 701_000
    assert report.full_bytes == 200_000 + 2 * 3_000_000
    assert [layer.index for layer in report.packed_layers] == [1, 2]


def test_dense_reads_and_lossy_crops_are_told():
    assert "read dequantized" in str(CacheReport((packed(0, reads_packed=0, reads_dense=3),)))
    assert "3 reads dequantized" in str(CacheReport((packed(0, reads_dense=3),)))
    assert "dequantized" not in str(CacheReport((packed(0),)))
    assert "lossy crop" in str(CacheReport((packed(0, lossy_crops=1),)))
    assert "lossy" not in str(CacheReport((packed(0),)))


def test_a_layer_with_a_reason_is_not_packed_whatever_its_method():
    report = CacheReport((packed(0, reason="head_dim is 12"),))
    assert report.packed_layers == []
    assert "full precision" in str(report) and "head_dim is 12" in str(report)


def test_an_empty_report_is_no_error():
    assert str(CacheReport(())) == ""
    assert str(CacheReport((LayerReport(0, "full"),))) == "layer 0: full precision, 0.00 MiB"


def test_the_data_of_a_report():
    data = json.loads(json.dumps(CacheReport((full(0), packed(1))).to_json()))
    assert data["schema_version"] == 1
    assert (data["cache_bytes"], data["full_bytes"]) == (901_000, 3_200_000)
    assert data["layers"][1]["method"] == "oscar"
    assert data["layers"][1]["bits_per_value"] == 3.083
    assert data["layers"][0]["reason"] == "a sliding window of 512 tokens"
