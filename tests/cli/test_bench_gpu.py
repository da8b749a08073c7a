"""`occamkv bench --device cuda` on a machine without a GPU: refusals, and the rest on a rig of the CPU."""

import json

import pytest
import torch

import some_gpu_result
from occamkv.bench import gpu_attend, gpu_capacity, gpu_decode, gpu_errors, gpu_timing
from occamkv.bench.result import check
from occamkv.cli import bench_gpu_tables, bench_tables, models
from one_line_error import complaints
from some_gpu_rig import cpu_rig, eager_steps

__all__ = ["eager_steps"]
pytestmark = pytest.mark.emulator  # it belongs to the CUDA backend, and takes a while

SMALL = {
    "attend": ("--shapes", "4/2/32", "--contexts", "300,1k", "--batches", "1,2", "--repetitions", 5),
    "encode": ("--shapes", "4/2/32", "--tokens", 128, "--repetitions", 5),
    "decode": (
        *("--contexts", "400,300", "--batches", "2", "--batch-contexts", "300", "--prefill-contexts", "150"),
        *("--steps", 2, "--repetitions", 5, "--method", "occam"),
    ),
}


@pytest.fixture
def small(occamkv, monkeypatch, eager_steps):
    """Run a benchmark of a GPU with a rig of the CPU; later options win."""
    for shown in (bench_tables, bench_gpu_tables):
        monkeypatch.setattr(shown.out, "width", 400)
    memory = {"decode": gpu_capacity._MARGIN + 2**21}
    monkeypatch.setattr(gpu_timing, "gpu_conditions", lambda device: some_gpu_result.GPU)
    monkeypatch.setattr(gpu_errors, "SHAPES", gpu_errors.SHAPES[:1])
    monkeypatch.setattr("occamkv.cli.conditions._accelerator", lambda device: "MADE UP")
    tiny = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96}
    monkeypatch.setattr(models, "random_gpu_models", lambda: {"tiny": tiny | heads})
    real = models.build_random
    monkeypatch.setattr(models, "build_random", lambda name, **given: real(name, **given | {"device": "cpu"}))

    def run(kind: str, *args: object):
        monkeypatch.setattr(gpu_timing, "gpu_rig", lambda name: cpu_rig(memory_bytes=memory.get(kind, 2**24)))
        return occamkv("bench", kind, "--device", "cuda", *SMALL[kind], *args)

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", SMALL)
def test_without_a_gpu_one_sentence_and_exit_code_2(occamkv, kind):
    done = occamkv("bench", kind, "--device", "cuda", *SMALL[kind])
    assert complaints(done.code, done.out, done.err, words=["'cuda'", "finds 0 NVIDIA GPUs", "occamkv doctor"]) == []


@pytest.mark.parametrize("kind", SMALL)
def test_json_fits_the_schema_and_the_table_shows_it(small, kind, tmp_path):
    done = small(kind, "--json", tmp_path / "a.json")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "a.json").read_text())
    check(result)
    assert result["kind"] == f"gpu-{kind}"
    assert result["gpu"] == some_gpu_result.GPU
    assert "MADE UP" in result["machine"]
    assert some_gpu_result.GPU["name"] in done.out
    for row in result["rows"]:
        assert (f"{row['ratio']:.2f}" if kind != "encode" else f"{row['gb_per_s']:.0f}") in done.out
    assert ("largest error against float64" in done.out) == (kind == "attend")
    assert ("largest batch, tried" in done.out) == (kind == "decode")


@pytest.mark.parametrize(
    ("kind", "module", "name"), [("attend", gpu_attend, "_rows"), ("decode", gpu_decode, "_prefill_rows")]
)
@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("CUDA error: an illegal address"), 1), (torch.OutOfMemoryError("full"), 0)]
)
def test_a_case_that_fails_costs_no_other_and_the_exit_code(
    small, kind, module, name, error, code, monkeypatch, tmp_path
):
    real, calls = getattr(module, name), []

    def rows(*given):
        calls.append(given)
        if len(calls) == 1:
            raise error
        return real(*given)

    monkeypatch.setattr(module, name, rows)
    done = small(kind, "--json", tmp_path / "a.json")
    assert done.code == code
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["rows"] and any(str(error) in case for case in result["dropped"])
    assert (" failed: " in done.err) == (code == 1)


@pytest.mark.parametrize("kind", ["attend", "decode"])
def test_without_time_for_anything_what_was_left_out_is_named(small, kind):
    done = small(kind, "--budget-seconds", 1e-9)
    assert complaints(done.code, done.out, done.err, words=["nothing was measured", "300", "budget"]) == []


@pytest.mark.parametrize("kind", ["attend", "decode"])
def test_a_figure_is_written(small, kind, tmp_path):
    pytest.importorskip("matplotlib")
    assert small(kind, "--plot", tmp_path / "a.png").code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_that_is_too_large_stops_with_its_figures(small, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_errors, "scene_errors", lambda *_, **__: (3.21e-3, 4e-3))
    done = small("attend", "--json", tmp_path / "a.json")
    assert done.code == 1
    assert "attention is wrong" in done.err and "3.21e-03" in done.err and "4.00e-03" in done.err
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        pytest.param("attend", ["--threads", "2"], ["--threads", "--device cuda"], id="threads"),
        pytest.param("attend", ["--queries", "2"], ["--queries"], id="queries"),
        pytest.param("attend", ["--backend", "cuda"], ["--backend"], id="backend"),
        pytest.param("encode", ["--isa", "avx2"], ["--isa"], id="isa"),
        pytest.param("decode", ["--dtypes", "bfloat16"], ["--dtypes"], id="dtypes"),
        pytest.param("decode", ["--model", "smollm2"], ["smollm2", "tiny"], id="model"),
        pytest.param("decode", ["--batches", "1"], ["batches"], id="batch of one"),
        pytest.param("attend", ["--shapes", ""], ["shapes are ''"], id="no shape"),
        pytest.param("attend", ["--budget-seconds", "0"], ["budget"], id="no budget"),
        pytest.param("attend", ["--device", "cpu"], ["--batches", "--device cpu"], id="batches on a CPU"),
        pytest.param(
            "decode", ["--device", "cpu"], ["--batch-contexts", "--device cpu"], id="batches of a CPU's model"
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(small, kind, args, words):
    done = small(kind, *args)
    assert complaints(done.code, done.out, done.err, words=words) == []


def test_the_model_of_gpus_is_not_among_those_of_a_cpu():
    assert not set(models.random_gpu_models()) & set(models.random_models())
    fields = next(iter(models.random_gpu_models().values()))
    heads = (fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"])
    assert heads == models.attention_shapes()[next(iter(models.random_gpu_models()))]
