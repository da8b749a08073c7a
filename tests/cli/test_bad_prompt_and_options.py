"""Bad prompts, options and plan files: one line that says what to do, exit code 2, no traceback."""

import json
from pathlib import Path

import pytest

import saved_models
from occamkv.integrations.transformers.plan import plan_for
from one_line_error import complaints

GOOD_PROMPT = ("--prompt", "w1 w2 w3")
LONG = saved_models.text(saved_models.LONGEST + 20)


@pytest.fixture
def refused(occamkv, folder_of):
    """Check that `run` refuses these arguments in the right form, naming these words."""

    def check(*args: object, words: tuple[str, ...], kind: str = "packable") -> None:
        done = occamkv("run", folder_of(kind), *args)
        assert complaints(done.code, done.out, done.err, words=words) == []

    return check


OPTIONS = {
    "unknown method": ("--method", "oscr", ["'oscr'", "did you mean 'oscar'", "kivi", "full"]),
    "unknown method that is like no other": ("--method", "zzz", ["'zzz'", "oscar"]),
    "bits that no record holds": ("--method", "kivi_k9v9", ["k_bits is 9", "2, 3, 4"]),
    "unreadable parts of a name": ("--method", "oscar_q4", ["'oscar_q4'", "oscar[_kXvY]"]),
    "full with parts": ("--method", "full_k2v2", ["'full_k2v2'"]),
    "unknown device": ("--device", "frobnicator", ["'frobnicator'", "occamkv doctor"]),
    "device without data": ("--device", "meta", ["'meta'"]),
    "unknown dtype": ("--dtype", "int8", ["'int8'", "bfloat16", "float32"]),
    "dtype that is a word of torch": ("--dtype", "load", ["'load'", "bfloat16"]),
    "chat without a template": ("--chat", "--no-check", ["--chat", "--raw"]),
    "json in no folder": ("--json", "/no such folder/report.json", ["/no such folder/report.json"]),
    "json that is a folder": ("--json", "/", ["'/'"]),
}


@pytest.mark.parametrize(("option", "value", "words"), OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_is_refused(refused, option, value, words):
    refused(*GOOD_PROMPT, option, value, words=words)


def test_a_device_that_this_machine_lacks_is_refused(refused):
    refused(*GOOD_PROMPT, "--device", "cuda:93", words=("'cuda:93'", "occamkv doctor"))


PROMPTS = {
    "no prompt": ([], ["--prompt TEXT", "--prompt-file FILE"]),
    "both prompts": ([*GOOD_PROMPT, "--prompt-file", "prompt.txt"], ["--prompt TEXT", "--prompt-file FILE"]),
    "empty": (["--prompt", ""], ["prompt is empty"]),
    "blank": (["--prompt", " \n "], ["prompt is empty"]),
    "bytes that are no UTF-8": (["--prompt", "w1 \udcff w2"], ["prompt"]),
    "longer than the model takes": (["--prompt", LONG, "--max-new-tokens", "5"], ["1049", "1024", "--max-new-tokens"]),
    "too long by its answer": (["--prompt", "w1 w2", "--max-new-tokens", "1023"], ["1025", "1024", "--max-new-tokens"]),
    "a file that does not exist": (["--prompt-file", "no such file"], ["'no such file'"]),
    "a file that is a folder": (["--prompt-file", "/"], ["'/'"]),
}


@pytest.mark.parametrize(("args", "words"), PROMPTS.values(), ids=PROMPTS)
def test_a_bad_prompt_is_refused(refused, args, words):
    refused(*args, words=words)


def test_a_prompt_that_just_fits_is_taken(occamkv, folder_of):
    fits = ("--prompt", saved_models.text(saved_models.LONGEST - 4), "--max-new-tokens", 4, "--no-check")
    assert occamkv("run", folder_of("packable"), *fits).code == 0


@pytest.mark.parametrize("content", [b"", b"  \n", b"w1 \xff\xfe w2"], ids=["empty", "blank", "no UTF-8"])
def test_a_bad_prompt_file_is_refused(refused, tmp_path, content):
    (tmp_path / "prompt.txt").write_bytes(content)
    refused("--prompt-file", tmp_path / "prompt.txt", words=("prompt",))


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% if"],
    ids=["one that refuses the message", "one that is broken"],
)
def test_a_chat_template_that_fails_is_refused(occamkv, copy_of, template):
    folder = copy_of("chat")
    (folder / "chat_template.jinja").write_text(template)
    done = occamkv("run", folder, *GOOD_PROMPT)
    assert complaints(done.code, done.out, done.err, words=["template", "--raw"]) == []


def good_plan() -> dict:
    return plan_for(saved_models.build("packable").config, "oscar").to_json()


def changed(change) -> str:
    data = good_plan()
    change(data)
    return json.dumps(data)


PLANS = {
    "no JSON": lambda: "{",
    "a list": lambda: "[]",
    "a number": lambda: "3",
    "bytes that are no text": lambda: b"\x00\xff\xfe",
    "another version": lambda: changed(lambda plan: plan.update(schema_version=99)),
    "no version": lambda: changed(lambda plan: plan.pop("schema_version")),
    "no layers": lambda: changed(lambda plan: plan.pop("layers")),
    "layers that are a number": lambda: changed(lambda plan: plan.update(layers=5)),
    "layers that are words": lambda: changed(lambda plan: plan.update(layers=["oscar", "oscar"])),
    "a model that is a list": lambda: changed(lambda plan: plan.update(model=[])),
    "a layer without a method": lambda: changed(lambda plan: plan["layers"][0].pop("method")),
    "an index that is a word": lambda: changed(lambda plan: plan["layers"][0].update(index="first")),
    "an index that is too high": lambda: changed(lambda plan: plan["layers"][1].update(index=7)),
    "one index twice": lambda: changed(lambda plan: plan["layers"][1].update(index=0)),
    "a method that is a number": lambda: changed(lambda plan: plan["layers"][0].update(method=3)),
    "an unknown method": lambda: changed(lambda plan: plan["layers"][0].update(method="oscr")),
    "unknown pins": lambda: changed(lambda plan: plan["layers"][0].update(pins="last:4")),
    "an unknown override": lambda: changed(lambda plan: plan["layers"][0].update(overrides={"bits": 2})),
    "overrides that are a list": lambda: changed(lambda plan: plan["layers"][0].update(overrides=[1])),
    "a layer too few": lambda: changed(lambda plan: plan["layers"].pop()),
    "another model": lambda: changed(lambda plan: plan["model"].update(fingerprint="0123456789abcdef")),
}


@pytest.mark.parametrize("content", PLANS.values(), ids=PLANS)
def test_a_bad_plan_file_is_refused(refused, tmp_path, content):
    made, path = content(), tmp_path / "plan.json"
    path.write_bytes(made if isinstance(made, bytes) else made.encode())
    refused(*GOOD_PROMPT, "--plan", path, words=("plan",))


def test_a_missing_plan_file_is_refused(refused):
    refused(*GOOD_PROMPT, "--plan", "no such plan.json", words=("'no such plan.json'",))


def test_a_plan_for_another_model_is_refused_with_what_differs(refused, tmp_path):
    Path(tmp_path / "plan.json").write_text(json.dumps(good_plan()))
    refused(*GOOD_PROMPT, "--plan", tmp_path / "plan.json", kind="half sliding", words=("fingerprint", "Make a plan"))


def test_the_good_plan_is_taken(occamkv, folder_of, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(good_plan()))
    command = ("run", folder_of("packable"), *GOOD_PROMPT, "--plan", tmp_path / "plan.json", "--max-new-tokens", 2)
    assert occamkv(*command).code == 0


USAGE = {
    "no model": (["run", "--prompt", "w1"], "MODEL"),
    "an unknown verb": (["frobnicate"], "frobnicate"),
    "an unknown option": (["run", "x", "--frobnicate"], "--frobnicate"),
    "no new tokens": (["run", "x", "--prompt", "w1", "--max-new-tokens", "0"], "--max-new-tokens"),
    "a word for a number": (["run", "x", "--prompt", "w1", "--seed", "two"], "--seed"),
    "a seed beyond 64 bits": (["run", "x", "--prompt", "w1", "--seed", "9" * 20], "seed"),
    "a temperature below 0": (["run", "x", "--prompt", "w1", "--temperature", "-1"], "--temperature"),
}


@pytest.mark.parametrize(("args", "word"), USAGE.values(), ids=USAGE)
def test_wrong_usage_ends_with_2_and_names_the_argument(occamkv, args, word):
    done = occamkv(*args)
    assert (done.code, done.out) == (2, "")
    assert word.lower() in done.err.lower()


WRONG_ENDS = {
    "exit code 1": (1, "", "error: 'x' is not allowed; use 'y'."),
    "exit code 0": (0, "", "error: 'x' is not allowed; use 'y'."),
    "text on stdout": (2, "w1", "error: 'x' is not allowed; use 'y'."),
    "two lines": (2, "", "error: 'x' is not allowed;\nuse 'y'."),
    "a traceback": (2, "", "Traceback (most recent call last): use 'x'"),
    "nothing": (2, "", ""),
    "another word": (2, "", "error: 'z' is not allowed; use 'y'."),
    "no way out": (2, "", "error: 'x' is unknown."),
}


@pytest.mark.parametrize("end", WRONG_ENDS.values(), ids=WRONG_ENDS)
def test_a_refusal_of_another_form_is_found(end):
    assert complaints(*end, words=["'x'"])
    assert not complaints(2, "", "error: 'x' is not allowed; use 'y'.\n", words=["'x'"])
