"""The JSON of `occamkv run`: its fields, and that its figures fit together and to the design's own arithmetic."""

import json
from typing import Any

import pytest

import saved_models
from occamkv import method
from occamkv.integrations.transformers.plan import plan_for
from occamkv.kernels import BACKENDS

MAYBE = type(None)
FIELDS = {
    "schema_version": int,
    "command": list,
    "versions": dict,
    "hardware": dict,
    "model": str,
    "method": str,
    "device": str,
    "dtype": str,
    "seed": int,
    "backend": (str, MAYBE),
    "prompt_tokens": int,
    "new_tokens": int,
    "text": str,
    "prefill_tokens_per_s": float,
    "decode_tokens_per_s": (float, MAYBE),
    "gpu_memory": (dict, MAYBE),
    "cache": dict,
    "report": dict,
    "fidelity": (dict, MAYBE),
    "fidelity_skipped": (str, MAYBE),
}
CACHE_FIELDS = {
    "tokens": int,
    "bits_per_value": float,
    "bits_with_residual": float,
    "computed_bytes": int,
    "computed_full_bytes": int,
    "measured_bytes": int,
    "measured_full_bytes": (int, MAYBE),
    "packed_layers": int,
    "full_layers": int,
    "quantized": bool,
}
FIDELITY_FIELDS = {
    "positions": int,
    **dict.fromkeys(("kl_mean", "kl_median", "kl_p99", "same_top", "perplexity", "perplexity_full"), float),
}
LAYER_FIELDS = {
    "index": int,
    "method": str,
    "reason": (str, MAYBE),
    "backend": (str, MAYBE),
    "bits_per_value": (float, MAYBE),
    **dict.fromkeys(("tokens", "packed_tokens", "packed_bytes", "residual_bytes", "pin_bytes", "full_bytes"), int),
}
HEADS, HEAD_DIM = 2, 32
TOKEN_BYTES = 2 * HEADS * HEAD_DIM * 2  # K and V of a layer, bfloat16
SCORED = 384


def missing(data: Any, fields: dict[str, Any]) -> list[str]:
    """Return the fields that are not there or of another type."""
    return [name for name, kind in fields.items() if name not in data or not isinstance(data[name], kind)]


def complaints(data: dict[str, Any]) -> list[str]:
    """Return what does not fit together in a report."""
    cache, layers, fidelity = data["cache"], data["report"]["layers"], data["fidelity"]
    wrong = (
        missing(data, FIELDS) + missing(cache, CACHE_FIELDS) + (missing(fidelity, FIDELITY_FIELDS) if fidelity else [])
    )
    wrong += [f"{name} of layer {layer['index']}" for layer in layers for name in missing(layer, LAYER_FIELDS)]
    packed = [layer for layer in layers if layer["method"] != "full"]
    held = sum(layer[part] for layer in layers for part in ("packed_bytes", "residual_bytes", "pin_bytes"))
    if wrong:
        return wrong
    checks = {
        "schema": (data["schema_version"], data["report"]["schema_version"]) == (1, 1),
        "computed bytes": cache["computed_bytes"] == cache["measured_bytes"] == held == data["report"]["cache_bytes"],
        "full bytes": cache["computed_full_bytes"] == sum(layer["full_bytes"] for layer in layers),
        "tokens": cache["tokens"] == data["prompt_tokens"] + data["new_tokens"] - 1,
        "tokens of a packed layer": all(layer["tokens"] == cache["tokens"] for layer in packed),
        "layer numbers": [layer["index"] for layer in layers] == list(range(len(layers))),
        "packed layers": cache["packed_layers"] == len(packed),
        "other layers": cache["full_layers"] == len(layers) - len(packed),
        "reasons": all((layer["reason"] is None) == (layer in packed) for layer in layers),
        "quantized": cache["quantized"] == any(layer["packed_tokens"] for layer in layers),
        "backend": data["backend"] in (BACKENDS if packed else [None]),
        "fidelity or why not": (fidelity is None) == bool(data["fidelity_skipped"]),
    }
    if fidelity:
        checks |= {
            "positions": 0 < fidelity["positions"] <= min(SCORED, data["prompt_tokens"] - 1 - 128),
            "order": 0 < fidelity["kl_median"] <= fidelity["kl_p99"] and fidelity["kl_mean"] <= fidelity["kl_p99"],
            "rate": 0 <= fidelity["same_top"] <= 1,
            "full bytes measured": cache["measured_full_bytes"] <= cache["computed_full_bytes"],
        }
    return [name for name, holds in checks.items() if not holds]


@pytest.fixture
def run(occamkv, folder_of, prompt_of):
    """Run and return the JSON that stdout holds."""

    def run_json(tokens: int, *args: object, kind: str = "packable") -> dict[str, Any]:
        done = occamkv("run", folder_of(kind), "--prompt-file", prompt_of(tokens), "--json", "-", *args)
        assert done.code == 0, done.err
        return done.json

    return run_json


@pytest.mark.parametrize(
    "name", ["occam", "occam_quality", "oscar", "oscar_roll", "kivi_k4v3_g64", "quarot_m8_roll", "rtn", "full"]
)
@pytest.mark.parametrize(("tokens", "new"), [(1, 1), (120, 20), (300, 5), (640, 3)], ids=lambda n: str(n))
def test_the_report_is_complete_and_fits_together(run, name, tokens, new):
    data = run(tokens, "--method", name, "--max-new-tokens", new)
    assert complaints(data) == []
    assert (data["prompt_tokens"], data["new_tokens"], data["method"]) == (tokens, new, name)
    assert data["cache"]["computed_full_bytes"] == 2 * TOKEN_BYTES * (tokens + new - 1)


@pytest.mark.parametrize("tokens", [256, 257, 258, 383, 384, 385, 511, 512, 513])
def test_a_prompt_of_any_length_from_256_tokens_is_compared(run, tokens):
    data = run(tokens, "--max-new-tokens", 2)
    assert complaints(data) == []
    assert data["fidelity"]["positions"] > 0


def test_more_tokens_than_before_never_mean_that_fewer_are_compared(run):
    positions = [run(tokens, "--max-new-tokens", 1)["fidelity"]["positions"] for tokens in (300, 512, 600, 900)]
    assert positions == sorted(positions)


@pytest.mark.parametrize("tokens", [1, 100, 129, 255])
def test_a_prompt_that_is_too_short_to_compare_says_so(run, tokens):
    data = run(tokens, "--max-new-tokens", 2)
    assert data["fidelity"] is None
    assert f"the prompt has {tokens} token" in data["fidelity_skipped"]


def test_layers_that_are_not_packed_have_a_reason_and_their_bytes_count(run):
    data = run(300, "--max-new-tokens", 4, kind="half sliding")
    assert complaints(data) == []
    assert (data["cache"]["packed_layers"], data["cache"]["full_layers"]) == (1, 1)
    assert "window of 32 tokens" in data["report"]["layers"][0]["reason"]
    assert data["report"]["layers"][0]["residual_bytes"] > 0


def test_packed_bytes_are_those_of_the_paper(run):
    data = run(300, "--method", "oscar", "--max-new-tokens", 5)
    codes_and_metadata = 24 * HEAD_DIM * HEADS * 256 // 32  # 3 bits per value
    norms = 4 * 256
    assert [layer["packed_bytes"] for layer in data["report"]["layers"]] == [codes_and_metadata + norms] * 2
    assert [layer["residual_bytes"] for layer in data["report"]["layers"]] == [128 * TOKEN_BYTES] * 2
    assert data["cache"]["bits_per_value"] == 3 + 32 / (2 * HEADS * HEAD_DIM)


def test_more_bits_cost_less(run):
    kl = [run(400, "--method", f"kivi_k{bits}v{bits}", "--max-new-tokens", 1)["fidelity"]["kl_mean"] for bits in "234"]
    assert kl == sorted(kl, reverse=True)


@pytest.mark.parametrize("min_tokens", [0, 310, 1000])
def test_with_min_tokens_bytes_still_fit_and_nothing_unpacked_is_compared(run, min_tokens):
    data = run(300, "--min-tokens", min_tokens, "--max-new-tokens", 20)
    assert complaints(data) == []
    assert data["cache"]["quantized"] == (min_tokens < 320)
    if min_tokens > 320:
        assert data["fidelity"] is None


def test_without_the_check_fidelity_says_why_it_is_missing(run):
    data = run(300, "--no-check", "--max-new-tokens", 2)
    assert (data["fidelity"], "--no-check" in data["fidelity_skipped"]) == (None, True)


@pytest.fixture
def plan_file(tmp_path):
    def write(chosen: Any):
        path = tmp_path / "plan.json"
        plan_for(saved_models.build("packable").config, chosen).save(path)
        return path

    return write


def test_a_plan_of_one_method_gives_what_that_method_gives(run, plan_file):
    by_name = run(640, "--method", "oscar_roll", "--max-new-tokens", 4)
    by_plan = run(640, "--plan", plan_file("oscar_roll"), "--max-new-tokens", 4)
    assert complaints(by_plan) == []
    for field in ("text", "cache", "report", "fidelity"):
        assert by_plan[field] == by_name[field], field


def test_pins_of_a_plan_are_held_and_counted(run, plan_file):
    data = run(640, "--plan", plan_file(method("oscar", pins="first:4")), "--max-new-tokens", 4)
    assert complaints(data) == []
    assert [layer["pin_bytes"] for layer in data["report"]["layers"]] == [4 * TOKEN_BYTES] * 2


def test_the_file_and_stdout_hold_the_same_report(run, occamkv, folder_of, prompt_of, tmp_path):
    command = ("run", folder_of("packable"), "--prompt-file", prompt_of(300), "--max-new-tokens", 4)
    assert occamkv(*command, "--json", tmp_path / "report.json").code == 0
    in_file, on_stdout = json.loads((tmp_path / "report.json").read_text()), run(300, "--max-new-tokens", 4)
    for field in ("text", "cache", "report", "fidelity"):
        assert in_file[field] == on_stdout[field]


SPOILED = {
    "no text": lambda d: d.pop("text"),
    "tokens as a word": lambda d: d.update(new_tokens="5"),
    "a byte too many": lambda d: d["cache"].update(measured_bytes=d["cache"]["measured_bytes"] + 1),
    "a byte too many in a layer": lambda d: d["report"]["layers"][1].update(residual_bytes=1),
    "one token too few": lambda d: d["cache"].update(tokens=d["cache"]["tokens"] - 1),
    "a layer lost": lambda d: d["report"]["layers"].pop(),
    "an excuse for a packed layer": lambda d: d["report"]["layers"][0].update(reason="sliding window"),
    "silence about fidelity": lambda d: d.update(fidelity=None),
    "more positions than tokens": lambda d: d["fidelity"].update(positions=300),
    "no KL": lambda d: d["fidelity"].pop("kl_mean"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_report_that_does_not_fit_together_is_found(run, spoil):
    data = run(300, "--max-new-tokens", 5)
    spoil(data)
    assert complaints(data)
