"""The receipt: other ways lead to its figures, an edit is noticed, and a control that fails voids it."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import occamkv
import saved_models
from occamkv import PackedCache, Verify
from occamkv.errors import UnsupportedInput
from occamkv.evals import compare, controls
from occamkv.evals.receipt import check, read_receipt, receipt, seal, second_pass
from occamkv.evals.receipt_page import html
from occamkv.evals.receipt_words import verdict
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.integrations.transformers.plan import plan_for

PROMPT, NEW = 520, 40
CONDITIONS = {
    "date": "2026-01-02",
    "command": "occamkv run",
    "machine": "a machine",
    "threads": 1,
    "versions": {"a": "1"},
}


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(4, 96, (1, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return saved_models.build("packable")


def made(model, tokens: int = PROMPT, method: Any = "occam", *, new: int = NEW, **options) -> dict[str, Any]:
    """Return the receipt of a generation."""
    verify = options.pop("verify", Verify(fraction=1 / 4))
    min_tokens = options.pop("min_tokens", 0)
    cache = PackedCache(model, method, verify=verify, min_tokens=min_tokens)
    out = model.generate(ids(tokens), past_key_values=cache, max_new_tokens=new, do_sample=False)
    return receipt(model, ids(tokens), cache, generated=out[0, tokens:], **options)


@pytest.fixture(scope="module")
def good(model) -> dict[str, Any]:
    return made(model, text="a prompt", name="a model", conditions=CONDITIONS)


def test_kl_is_that_of_compare_and_the_first_control_is_exactly_0(model, good):
    fidelity, _, full_bytes = compare(model, ids(PROMPT), "occam", score_from=PROMPT - 385, one_shot=PROMPT - 385)
    assert good["fidelity"] == fidelity.to_json()
    assert good["fidelity"]["kl_mean"] > 0
    assert second_pass(model, ids(PROMPT), "occam").full_bytes == full_bytes
    assert good["controls"][0]["told"].startswith("largest |KL| 0, same top token at 100.0 %")


def test_live_figures_and_bytes_are_those_of_the_cache(model, good):
    cache = PackedCache(model, verify=Verify(fraction=1 / 4))
    model.generate(ids(PROMPT), past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    report = cache.report(verify=True)
    assert good["live"] == report.verification.to_json()
    assert [layer["live"] for layer in good["layers"]] == good["live"]["layers"]
    assert good["live"]["steps"] == 10
    tensors = PROMPT + NEW - 1
    per_token = 2 * 2 * 32 * 4  # K and V, 2 heads of 32, float32
    assert good["bytes"]["full"] == good["bytes"]["shadows"] == 2 * per_token * tensors
    assert good["bytes"]["computed"] == good["bytes"]["measured"] == good["bytes"]["cache"] == report.nbytes


def test_all_is_said(good):
    assert (good["schema_version"], good["what"], good["void"]) == (1, "occamkv receipt", False)
    assert [control["passed"] for control in good["controls"]] == [True] * 5
    assert good["model"]["name"] == "a model"
    assert good["plan"] == plan_for(saved_models.build("packable").config, "occam").to_json()
    assert good["prompt"] == {
        "tokens": PROMPT,
        "ids_sha256": hashlib.sha256(str(ids(PROMPT)[0].tolist()).replace(" ", "").encode()).hexdigest(),
        "text_sha256": hashlib.sha256(b"a prompt").hexdigest(),
    }
    assert good["generated"]["tokens"] == NEW
    assert good["conditions"] == CONDITIONS
    for said in ("occam holds 559 tokens", "last 384 prompt tokens", "of 2 of 2 packed layers", "all 5 controls held."):
        assert said in good["verdict"]
    assert good["verdict"].count(".\n") == 0 and good["verdict"].endswith("held.")


def leaves(thing: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(thing, dict | list):
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            yield from leaves(value, (*path, key))
    else:
        yield path


def edited(data: dict[str, Any], path: tuple) -> dict[str, Any]:
    """Return a copy in which one leaf is another, of the same type."""
    copy = json.loads(json.dumps(data))
    *way, last = path
    inner = copy
    for key in way:
        inner = inner[key]
    value = inner[last]
    other = {bool: lambda: not value, str: lambda: value + "0", type(None): lambda: 0}
    inner[last] = other.get(type(value), lambda: value + 1)()
    return copy


def test_any_edit_is_noticed(good):
    check(good)
    paths = list(leaves(good))
    assert len(paths) > 80
    for path in paths:
        with pytest.raises(UnsupportedInput):
            check(edited(good, path))
    with pytest.raises(UnsupportedInput, match="changed after it was written"):
        check(edited(good, ("fidelity", "kl_mean")))


def test_the_hash_is_one_that_anyone_can_compute_and_no_signature(good):
    rest = {name: value for name, value in good.items() if name != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert good["sha256"] == hashlib.sha256(canonical.encode("ascii")).hexdigest()
    check(seal(edited(good, ("fidelity", "kl_mean"))))


def test_a_file_is_read_back_whatever_its_layout(good, tmp_path):
    for indent, backwards in ((1, False), (None, True)):
        path = tmp_path / "receipt.json"
        path.write_text(json.dumps(dict(sorted(good.items(), reverse=backwards)), indent=indent))
        assert read_receipt(path) == good


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read"),
        ("{", "is no JSON"),
        ("[1]", "schema_version is None"),
        ('{"schema_version": 2}', "schema_version is 2"),
        ('{"schema_version": 1}', "lacks 'what'"),
        (b"\xff\xfe", "is no JSON"),
    ],
)
def test_what_is_no_receipt_is_refused(content, told, tmp_path):
    path = tmp_path / "receipt.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnsupportedInput, match=re.escape(told)):
        read_receipt(path)


def test_bits_that_move_nothing_void_the_receipt(model, monkeypatch):
    monkeypatch.setattr(controls, "_flipper", lambda index: lambda cache: None)
    data = made(model)
    assert data["void"]
    assert data["verdict"].startswith("Void: ") and "flipped bits move the logits" in data["verdict"]


def test_a_byte_that_the_cache_hides_voids_the_receipt(model, monkeypatch):
    told = PackedLayer.report

    def report(layer: PackedLayer):
        row = told(layer)
        return row.__class__(**{**vars(row), "packed_bytes": row.packed_bytes - 1})

    monkeypatch.setattr(PackedLayer, "report", report)
    data = made(model)
    assert [check["name"] for check in data["controls"] if not check["passed"]] == [
        "packed cache: bytes are those of the tensors",
        "live cache: bytes are those of the tensors",
    ]
    assert data["void"]


def test_a_full_cache_that_differs_from_itself_voids_the_receipt(model, monkeypatch):
    agrees = controls.full_agrees

    def disturbed(reading):
        reading.tally.kl[-1] = reading.tally.kl[-1] + 1e-7
        return agrees(reading)

    monkeypatch.setattr(controls, "full_agrees", disturbed)
    data = made(model)
    assert data["void"] and "full precision against itself" in data["verdict"]


@pytest.mark.parametrize("tokens", [1, 60, 130])
def test_a_prompt_too_short_to_pack_proves_nothing_and_says_so(model, tokens):
    data = made(model, tokens, new=2)
    assert data["fidelity"] is None and f"the prompt has {tokens} token" in data["fidelity_skipped"]
    held = tokens + 1
    wanted = f"Nothing is proven: nothing was packed, for {held} tokens are held and packing starts at 132."
    assert (data["verdict"], data["live"]["error_mean"], data["void"]) == (wanted, None, False)
    check(data)


def test_a_prompt_too_short_for_the_second_pass_still_has_a_live_run(model):
    data = made(model, 200)
    assert "what that changes in the logits was not measured (the prompt has 200 tokens" in data["verdict"]
    assert "% off on 10 steps" in data["verdict"]
    assert data["verdict"].endswith("the only control held.")


@pytest.mark.parametrize("verify", [None, Verify(fraction=1e-6)])
def test_a_run_without_a_sampled_step_says_so(model, verify):
    data = made(model, verify=verify)
    assert "no step of the live run was verified" in data["verdict"]
    assert (data["live"] is None) == (verify is None)
    check(data)


@pytest.mark.parametrize(("min_tokens", "quantized"), [(500, True), (10**6, False)])
def test_min_tokens_of_the_cache_hold_in_the_second_pass_too(model, min_tokens, quantized):
    data = made(model, min_tokens=min_tokens)
    assert (data["fidelity"] is not None, data["void"]) == (quantized, False)
    assert data["verdict"].startswith("Nothing is proven") != quantized


@pytest.mark.parametrize("method", ["oscar", "occam_quality", "ott", "kivi_k4v4", "auto"])
def test_every_method_has_a_receipt(model, method):
    data = made(model, method=method)
    assert not data["void"], data["controls"]
    check(data)


@pytest.mark.parametrize("method", ["oscar", occamkv.method("oscar", pins="none", window=256)], ids=str)
def test_tokens_of_a_last_step_that_still_wait_are_counted_as_they_will_be_held(method, model):
    cache, text = PackedCache(model, method), ids(PROMPT)
    with torch.no_grad():
        for part in (text[:, :-5], text[:, -5:]):
            model(part, past_key_values=cache)
    waiting = cache.report().nbytes
    data = receipt(model, text, cache)
    assert not data["void"], data["controls"]
    assert data["bytes"]["computed"] == data["bytes"]["measured"] < waiting


def test_pins_that_leave_nothing_to_read_are_said(model):
    plan = plan_for(model.config, "oscar")
    pinned = [entry.__class__(entry.index, entry.method.with_overrides(pins="first:300")) for entry in plan.layers]
    skipped = second_pass(model, ids(400), plan.__class__(tuple(pinned))).skipped
    assert skipped == "the prompt has 400 tokens; at least 430 are needed to read packed ones"


def test_a_run_that_moved_attention_has_no_receipt(model):
    cache = PackedCache(model, pin_bias=1.0)
    model.generate(ids(PROMPT), past_key_values=cache, max_new_tokens=2, do_sample=False)
    with pytest.raises(UnsupportedInput, match="pin_bias moves attention"):
        receipt(model, ids(PROMPT), cache)


def test_two_prompts_at_once_are_refused(model):
    with pytest.raises(UnsupportedInput, match="one text"):
        second_pass(model, ids(300).expand(2, -1), "occam")


def test_the_page_says_what_the_receipt_says_and_needs_nothing_else(good):
    page = html(good)
    assert page == html(json.loads(json.dumps(good)))
    assert good["verdict"].replace("'", "&#x27;") in page
    assert good["sha256"] in page
    assert page.count("passed</span>") == 5
    assert not re.search(r"<script|src=|href=|https?://|@import|url\(", page)
    assert f"{100 * good['layers'][1]['live']['error_mean']:.1f}\N{NO-BREAK SPACE}%" in page


def test_names_cannot_break_the_page(good):
    given = {**good["model"], "name": "<script>alert(1)</script>"}
    page = html(seal({**good, "model": given, "conditions": {**CONDITIONS, "command": "<b>&"}}))
    assert "<script" not in page and "&lt;b&gt;&amp;" in page


def test_the_page_of_a_void_receipt_is_headed_by_it_and_has_no_verdict(good):
    checks = [{**good["controls"][0], "passed": False}, *good["controls"][1:]]
    page = html(seal({**good, "controls": checks, "void": True}))
    assert "This receipt is void" in page and page.count("failed</span>") == 1
    assert 'class="verdict"' not in page


@pytest.mark.parametrize("tokens", [60, 200])
def test_there_is_a_page_where_there_is_little_to_say(model, tokens):
    page = html(made(model, tokens, new=2, verify=None))
    assert "No second pass: the prompt has" in page and "This run had no shadows." in page


def test_an_edited_receipt_has_no_page(good):
    with pytest.raises(UnsupportedInput, match="changed after"):
        html(edited(good, ("bytes", "cache")))


def test_the_verdict_is_made_of_the_figures(good):
    assert verdict(good) == good["verdict"]
    assert verdict(edited(good, ("fidelity", "same_top"))) != good["verdict"]
