"""`occamkv bench`: results that fit the schema, tables, files, and refusals in one line."""

import json
import os

import pytest

from occamkv.bench.result import check
from occamkv.cli import bench_tables
from occamkv.cli.models import attention_shapes, build_random, random_models
from occamkv.kernels.cpu import library
from one_line_error import complaints

SMALL = {
    "attend": ("--shapes", "4/2/32", "--contexts", "300,1k", "--repetitions", 5, "--backend", "reference"),
    "encode": ("--shapes", "4/2/32", "--tokens", 128, "--repetitions", 5, "--backend", "reference"),
    "decode": ("--contexts", "300,400", "--steps", 1, "--prefill-contexts", "150", "--prefill-repetitions", 1),
}


@pytest.fixture
def small(occamkv, folder_of, monkeypatch):
    """Run a benchmark with tiny settings; later options win."""
    monkeypatch.setattr(bench_tables.out, "width", 400)

    def run(kind: str, *args: object):
        model = ("--model", folder_of("packable")) if kind == "decode" else ()
        return occamkv("bench", kind, *model, *SMALL[kind], *args)

    return run


@pytest.mark.parametrize("kind", SMALL)
def test_json_fits_the_schema_and_says_where_it_comes_from(small, kind):
    result = small(kind, "--json", "-").json
    check(result)
    assert result["kind"] == kind
    assert result["cpu"]["cores"] == os.cpu_count()
    assert result["cpu"]["load_start"] >= 0 <= result["cpu"]["load_end"]
    assert {row["backend"] for row in result["rows"]} == {"reference"} or kind == "decode"
    if kind != "encode":
        assert {row["context"] for row in result["rows"]} == {"attend": {300, 1024}, "decode": {300, 400}}[kind]


@pytest.mark.parametrize("kind", SMALL)
def test_the_table_shows_what_the_file_holds(small, kind, tmp_path):
    done = small(kind, "--json", tmp_path / "a.json")
    assert done.code == 0
    result = json.loads((tmp_path / "a.json").read_text())
    for row in result["rows"]:
        assert row["shape"][-10:] in done.out
        ratio = row["ratio_reference"] if kind == "encode" else row["ratio_best_stock"]
        assert f"{ratio:.2f}" in done.out
    assert ("prefill" in done.out) == (kind == "decode")
    assert ("error against float64" in done.out) == (kind == "attend")


@pytest.mark.parametrize("kind", ["attend", "decode"])
def test_a_figure_is_written(small, kind, tmp_path):
    pytest.importorskip("matplotlib")
    assert small(kind, "--plot", tmp_path / "a.png").code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(library.unavailable() is not None, reason="no native library")
def test_an_instruction_set_is_asked_for_and_noted(small):
    before = library.isa()
    try:
        assert small("encode", "--isa", "portable", "--json", "-").json["cpu"]["isa"] == "portable"
    finally:
        library.select(before)
    refused = small("encode", "--isa", "sse9")
    assert refused.code == 2 and "'sse9'" in refused.err and before in refused.err


def test_all_threads_are_those_of_the_machine(small):
    rows = small("encode", "--threads", "all", "--json", "-").json["rows"]
    assert [row["threads"] for row in rows] == [os.cpu_count()]


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        pytest.param("attend", ["--contexts", "0"], ["contexts", "0", "131072"], id="no tokens"),
        pytest.param("attend", ["--contexts", "4x"], ["4x", "512,4k"], id="no number"),
        pytest.param("attend", ["--contexts", "100"], ["context 100", "133 or more"], id="nothing packed"),
        pytest.param("attend", ["--shapes", "gpt9"], ["gpt9", "smollm2", "32/8/128"], id="unknown shape"),
        pytest.param("attend", ["--shapes", "9/2/64"], ["9 query heads"], id="odd shape"),
        pytest.param("attend", ["--shapes", ""], ["shapes"], id="no shape"),
        pytest.param("attend", ["--method", "full"], ["'full'", "packs nothing"], id="full"),
        pytest.param("attend", ["--method", "occma"], ["occma", "occam"], id="unknown method"),
        pytest.param("attend", ["--backend", "gpu"], ["gpu", "reference"], id="unknown backend"),
        pytest.param("attend", ["--threads", "0"], ["threads", "0"], id="no threads"),
        pytest.param("attend", ["--repetitions", 4], ["repetitions", "4"], id="few repetitions"),
        pytest.param("attend", ["--queries", 0], ["queries"], id="no queries"),
        pytest.param("attend", ["--plot", "a.svg"], ["a.svg", ".png"], id="not a png"),
        pytest.param("attend", ["--json", "no such folder/a"], ["no such folder"], id="no folder"),
        pytest.param("attend", ["--contexts", ""], ["contexts"], id="no contexts"),
        pytest.param("encode", ["--tokens", 0], ["tokens is 0"], id="no tokens to encode"),
        pytest.param("encode", ["--tokens", 100], ["tokens is 100", "128"], id="no whole page"),
        pytest.param("decode", ["--model", "no_such_model"], ["no_such_model"], id="unknown model"),
        pytest.param("decode", ["--model", ""], ["models"], id="no model"),
        pytest.param("decode", ["--dtypes", "float16"], ["float16", "bfloat16"], id="unknown dtype"),
        pytest.param("decode", ["--steps", 0], ["steps"], id="no steps"),
        pytest.param("decode", ["--prefill-contexts", "1"], ["prefill contexts"], id="prompt of one"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(small, kind, args, words):
    done = small(kind, *args)
    assert complaints(done.code, done.out, done.err, words=words) == []


def test_without_a_verb_the_help_lists_them(occamkv):
    shown = occamkv("bench")
    assert all(kind in shown.out + shown.err for kind in SMALL)


def test_the_known_shapes_can_be_packed():
    from occamkv.bench import Shape

    assert [Shape(name, *heads).name for name, heads in attention_shapes().items()][:2] == [
        "llama-3.1-8b",
        "qwen3-0.6b",
    ]
    assert {heads[1] for heads in attention_shapes().values()} == {8, 3, 1}


def test_a_random_model_is_built_from_its_configuration(monkeypatch):
    import torch

    from occamkv.cli import models

    (name, fields), *_ = random_models().items()
    small = {**fields, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    monkeypatch.setattr(models, "random_models", lambda: {name: small})
    built = [build_random(name, dtype="bfloat16", seed=0) for _ in range(2)]
    assert built[0].dtype == torch.bfloat16
    assert built[0].config.num_attention_heads == fields["num_attention_heads"]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in built), strict=True))
