"""`occamkv plan`: exit codes, sentences, JSON, the plan that `run` takes."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from occamkv import PackedCache
from occamkv.cache import Plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LLAMA, WINDOWS_ONLY = CONFIGS / "llama-3.1-8b.json", CONFIGS / "mistral-7b-v0.1.json"


@pytest.fixture
def changed(tmp_path):
    """Return a function that writes a changed configuration; None takes a field out."""

    def write(name: str, inside: str | None = None, **fields: object) -> Path:
        data = json.loads((CONFIGS / f"{name}.json").read_text())
        target = data if inside is None else data[inside]
        for field, value in fields.items():
            target.pop(field, None)
            if value is not None:
                target[field] = value
        path = tmp_path / "config.json"
        path.write_text(json.dumps(data))
        return path

    return write


def test_what_fits_is_chosen_in_the_order_given(occamkv):
    done = occamkv("plan", LLAMA, "--context", "128k", "--memory", "18.2GiB", "--json", "-")
    rows = {row["method"]: row for row in done.json["methods"]}
    assert done.code == 0
    assert {name: row["fits"] for name, row in rows.items()} == {
        "full": False,
        "occam_quality_k3v2_g64": False,
        "occam": True,
        "occam_small": True,
        "oscar": False,
    }
    assert done.json["chosen"] == "occam"
    assert (done.json["schema_version"], done.json["parameters"]) == (1, 8_030_261_248)
    for row in rows.values():
        parts = [row[f"{part}_bytes"] for part in ("records", "residual", "pin", "full")]
        assert row["cache_bytes"] == sum(parts)
        assert row["total_bytes"] == done.json["weights_bytes"] + row["cache_bytes"] + row["transient_bytes"]
        assert row["ratio"] == rows["full"]["cache_bytes"] / row["cache_bytes"]
    assert rows["occam_quality_k3v2_g64"]["at_most"]
    last = done.json["contexts"][-1]
    assert (last["context"], last["caches"]["occam"]["cache_bytes"]) == (131072, rows["occam"]["cache_bytes"])


def test_what_does_not_fit_says_what_would(occamkv):
    done = occamkv("plan", LLAMA, "--context", "128k", "--memory", "17GiB", "--method", "oscar")
    assert done.code == 1
    assert "1 x 128k tokens do not fit into 17.00 GiB: oscar takes 18.49 GiB. With oscar fit " in done.out


def test_a_reserve_and_quantized_weights_are_counted(occamkv):
    options = ("plan", LLAMA, "--method", "oscar", "--memory", "19GiB", "--json", "-")
    assert occamkv(*options).code == 0
    assert occamkv(*options, "--reserve", "1g").code == 1
    assert occamkv(*options, "--reserve", "1g", "--weights-bits", 8).code == 0
    assert occamkv(*options, "--weights", "4.5GiB").json["weights_bytes"] == 4.5 * 2**30


def test_without_a_memory_nothing_is_asked(occamkv):
    done = occamkv("plan", LLAMA, "--json", "-")
    assert done.code == 0
    assert {row["fits"] for row in done.json["methods"]} == {None}


def test_a_memory_below_the_weights_is_said(occamkv):
    done = occamkv("plan", LLAMA, "--memory", "8GiB")
    assert done.code == 1
    assert "nothing fits into 8.00 GiB: the weights take 14.96 GiB" in done.out


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mistral-7b-v0.1", "sliding window.*4096"), ("deepseek-v3", "K of 1 x 512 and V of 1 x 64")],
)
def test_a_model_that_cannot_be_packed_is_counted_and_refused(occamkv, name, reason):
    done = occamkv("plan", CONFIGS / f"{name}.json", "--memory", "4000GiB", "--json", "-")
    assert done.code == 3
    assert [row["method"] for row in done.json["methods"]] == ["full"]
    assert done.json["methods"][0]["cache_bytes"] > 0
    assert re.search(reason, done.err)


def test_a_context_beyond_the_models_is_said(occamkv):
    told = "131072 tokens are more than the 40960 (40k)"
    assert told in occamkv("plan", CONFIGS / "qwen3-8b.json", "--context", "128k").out
    assert told not in occamkv("plan", CONFIGS / "qwen3-8b.json").out


def test_stored_quantization_is_said_unless_the_size_is_given(occamkv):
    oss = CONFIGS / "gpt-oss-20b.json"
    assert "stored quantized (mxfp4)" in occamkv("plan", oss).out
    assert "stored quantized" not in occamkv("plan", oss, "--weights", "12.8GiB").out


@pytest.mark.parametrize(("word", "name"), [("small", "occam_small"), ("high", "occam_quality_k3v2_g64")])
def test_a_word_for_quality_names_a_method(occamkv, word, name):
    done = occamkv("plan", LLAMA, "--quality", word, "--json", "-")
    assert [row["method"] for row in done.json["methods"]] == ["full", name]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--memory", "24"), "memory is '24'; allowed: a number with a unit"),
        (("--context", "many"), "context is 'many'"),
        (("--method", "ocam"), "did you mean 'occam'?"),
        (("--method", ","), "allowed: one or more names"),
        (("--quality", "0.02"), "allowed: small, default, high"),
        (("--quality", "high", "--method", "occam"), "give one of --method, --quality and --use-plan"),
        (("--dtype", "int4"), "allowed: bfloat16, float16, float32"),
        (("--weights", "4GiB", "--weights-bits", "4"), "give either --weights SIZE or --weights-bits N"),
        (("--weights-bits", "5"), "allowed: 4, 8, 16"),
        (("--source", "100"), "this model has no encoder"),
        (("--plot", "a.svg"), "ends with .png"),
        (("--json", "no/such/folder/a.json"), "cannot write"),
        (("--use-plan", "no such plan.json"), "cannot read the plan"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(occamkv, options, told):
    done = occamkv("plan", LLAMA, *options)
    assert (done.code, done.out) == (2, "")
    assert told in done.err


@pytest.mark.parametrize(
    ("name", "inside", "field", "told"),
    [
        ("llama-3.1-8b", None, "num_hidden_layers", "lacks 'num_hidden_layers'; transformers would take its default"),
        ("llama-3.1-8b", None, "hidden_size", "lacks 'hidden_size'"),
        ("gemma-3-27b", "text_config", "num_hidden_layers", "lacks 'text_config.num_hidden_layers'"),
        ("llama-3.1-8b", None, "model_type", "lacks 'model_type'"),
    ],
)
def test_a_missing_field_is_named(occamkv, changed, name, inside, field, told):
    done = occamkv("plan", changed(name, inside, **{field: None}))
    assert done.code == 2
    assert told in done.err


def test_a_default_that_was_taken_is_said(occamkv, changed):
    told = "does not say vocab_size; transformers takes 32000"
    assert told in occamkv("plan", changed("llama-3.1-8b", vocab_size=None)).out
    assert told not in occamkv("plan", LLAMA).out


def test_an_unknown_type_of_model_is_refused(occamkv, changed):
    done = occamkv("plan", changed("llama-3.1-8b", model_type="llamma"))
    assert done.code == 2
    assert "no model_type 'llamma'; did you mean 'llama'?" in done.err


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_what_is_no_configuration_is_refused(occamkv, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert occamkv("plan", tmp_path / "config.json").code == 2


def test_a_configuration_that_does_not_fit_together_is_refused(occamkv, changed):
    done = occamkv("plan", changed("llama-3.1-8b", num_key_value_heads=7))
    assert done.code == 2
    assert "32 query heads are no multiple of 7 KV heads" in done.err


def test_an_encoder_needs_the_length_of_its_text(occamkv, tmp_path):
    small = {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 32,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 99,
    }
    (tmp_path / "config.json").write_text(json.dumps(small | {"is_encoder_decoder": True}))
    assert "--source N" in occamkv("plan", tmp_path / "config.json", "--context", "1k").err
    rows = occamkv("plan", tmp_path / "config.json", "--context", "1k", "--source", "2k", "--json", "-").json["methods"]
    assert rows[0]["cache_bytes"] == 2 * (1024 + 2048) * 2 * 4 * 32 * 2


def test_the_plan_that_is_written_is_the_one_that_a_cache_takes(occamkv, folder_of, tmp_path):
    file, folder = tmp_path / "plan.json", folder_of("half sliding")
    done = occamkv("plan", folder, "--method", "oscar", "--memory", "1GiB", "--plan", file)
    assert done.code == 0
    written = Plan.load(file)
    assert [str(layer.method) for layer in written.layers] == ["full", "oscar"]
    config = AutoConfig.from_pretrained(folder)
    assert PackedCache(config, plan=written).plan == written
    again = occamkv("plan", folder, "--use-plan", file, "--json", "-").json["methods"]
    asked = occamkv("plan", folder, "--method", "oscar", "--json", "-").json["methods"]
    assert [row["cache_bytes"] for row in again] == [row["cache_bytes"] for row in asked]
    other = occamkv("plan", folder_of("packable"), "--use-plan", file)
    assert other.code == 2
    assert "Make a plan for this model" in other.err


def test_nothing_is_written_for_what_does_not_fit(occamkv, tmp_path):
    done = occamkv("plan", LLAMA, "--memory", "1GiB", "--plan", tmp_path / "plan.json")
    assert done.code == 1
    assert not (tmp_path / "plan.json").exists()


def test_the_figure_is_a_png(occamkv, tmp_path):
    pytest.importorskip("matplotlib")
    done = occamkv("plan", LLAMA, "--memory", "24GiB", "--plot", tmp_path / "a.png")
    assert done.code == 0
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
