"""`occamkv run`: what it generates, what it shows, and how it ends."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import saved_models
from occamkv import PackedCache
from occamkv.integrations.transformers.plan import plan_for

PROMPT = 300


@pytest.fixture
def generated(folder_of):
    """Return what the packable model itself generates in bfloat16, greedily, with a packed cache or without."""

    def generate(new: int, method: str | None) -> str:
        model = AutoModelForCausalLM.from_pretrained(folder_of("packable"), dtype=torch.bfloat16).eval()
        tokenizer = saved_models.tokenizer()
        ids = tokenizer(saved_models.text(PROMPT), return_tensors="pt").input_ids
        cache = None if method is None else PackedCache(model, method)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
        return tokenizer.decode(out[0, PROMPT:], skip_special_tokens=True)

    return generate


@pytest.fixture
def run(occamkv, folder_of, prompt_of):
    """Run with the packable model; return the command's end and its JSON."""

    def run_json(*args: object, tokens: int = PROMPT, kind: str = "packable") -> dict:
        done = occamkv("run", folder_of(kind), "--prompt-file", prompt_of(tokens), "--json", "-", *args)
        assert done.code == 0, done.err
        return done.json

    return run_json


@pytest.mark.parametrize("method", ["occam", "oscar", "oscar_roll"])
def test_the_text_is_what_the_model_generates_with_a_packed_cache(run, generated, method):
    text = run("--method", method, "--max-new-tokens", 20)["text"]
    assert text == generated(20, method)
    assert text != generated(20, None)


def test_full_gives_the_untouched_models_text_and_says_that_nothing_was_quantized(
    occamkv, folder_of, prompt_of, generated
):
    command = ("run", folder_of("packable"), "--prompt-file", prompt_of(PROMPT), "--max-new-tokens", 20)
    done = occamkv(*command, "--method", "full")
    assert done.code == 0
    assert generated(20, None) in done.out
    assert "nothing was quantized" in done.out
    assert "nothing was quantized" not in occamkv(*command).out


def test_a_plan_that_packs_nothing_says_that_nothing_was_quantized(occamkv, folder_of, prompt_of, tmp_path):
    plan_for(saved_models.build("packable").config, "full").save(tmp_path / "plan.json")
    done = occamkv("run", folder_of("packable"), "--prompt-file", prompt_of(PROMPT), "--plan", tmp_path / "plan.json")
    assert (done.code, "nothing was quantized" in done.out) == (0, True)


@pytest.mark.parametrize("tokens", [1, 2, 64, 124])
def test_a_short_prompt_runs_and_says_that_nothing_is_packed_yet(occamkv, folder_of, tokens):
    prompt = ("--prompt", saved_models.text(tokens), "--max-new-tokens", 4)
    done = occamkv("run", folder_of("packable"), *prompt)
    assert done.code == 0, done.err
    assert f"nothing packed yet: {tokens + 3} tokens, packing starts at 132" in done.out
    assert f"{tokens} prompt + 4 new" in done.out


def test_once_132_tokens_are_there_nothing_is_packed_yet_is_no_longer_said(occamkv, folder_of):
    done = occamkv("run", folder_of("packable"), "--prompt", saved_models.text(129), "--max-new-tokens", 4)
    assert (done.code, "nothing packed yet" in done.out) == (0, False)


def test_the_table_has_tokens_speed_bytes_bits_layers_and_fidelity(occamkv, folder_of, prompt_of, tmp_path):
    command = ("run", folder_of("half sliding"), "--prompt-file", prompt_of(700), "--max-new-tokens", 8)
    done = occamkv(*command, "--json", tmp_path / "report.json")
    assert done.code == 0, done.err
    data = json.loads((tmp_path / "report.json").read_text())
    cache, fidelity = data["cache"], data["fidelity"]
    for shown in (
        data["text"],
        "700 prompt + 8 new",
        f"{data['prefill_tokens_per_s']:.0f} tokens/s",
        f"{data['decode_tokens_per_s']:.1f} tokens/s",
        f"{cache['measured_bytes'] / 2**20:.2f} MiB",
        f"{cache['computed_full_bytes'] / 2**20:.2f} MiB",
        f"{cache['bits_per_value']:.2f}",
        "1 packed, 1 not",
        "window of 32 tokens",
        f"{fidelity['kl_mean']:.4f} nats",
        f"{100 * fidelity['same_top']:.1f} %",
        f"{fidelity['positions']} prompt tokens",
    ):
        assert shown in done.out


def test_greedy_text_does_not_depend_on_the_seed(run):
    assert len({run("--seed", seed, "--max-new-tokens", 24, "--no-check")["text"] for seed in (0, 0, 1)}) == 1


def test_sampled_text_is_the_same_for_the_same_seed_and_another_for_another(run):
    sampling = ("--temperature", 1.5, "--max-new-tokens", 24, "--no-check")
    texts = [run("--seed", seed, *sampling)["text"] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_the_chat_template_is_used_unless_raw_is_given(run):
    cheap = ("--max-new-tokens", 1, "--no-check")
    assert run(*cheap, kind="chat")["prompt_tokens"] == PROMPT + saved_models.CHAT_WORDS
    assert run(*cheap, "--chat", kind="chat")["prompt_tokens"] == PROMPT + saved_models.CHAT_WORDS
    assert run(*cheap, "--raw", kind="chat")["prompt_tokens"] == PROMPT
    assert run(*cheap, kind="packable")["prompt_tokens"] == PROMPT


def test_generation_stops_at_the_end_token_of_the_model(run, occamkv, copy_of, prompt_of):
    folder, first = copy_of("packable"), run("--max-new-tokens", 1)
    config = json.loads((folder / "generation_config.json").read_text())
    ending = saved_models.tokenizer().convert_tokens_to_ids(first["text"])
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ending}))
    command = ("run", folder, "--prompt-file", prompt_of(PROMPT), "--json", "-")
    data = occamkv(*command, "--max-new-tokens", 30).json
    assert (data["new_tokens"], data["decode_tokens_per_s"]) == (1, None)
    assert run("--max-new-tokens", 30)["new_tokens"] == 30


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param("no attention", "linear attention", id="a model without attention"),
        pytest.param("all sliding", "sliding window", id="a model whose layers all slide"),
    ],
)
def test_a_model_with_nothing_to_pack_ends_with_3_and_the_reason(occamkv, folder_of, kind, reason):
    done = occamkv("run", folder_of(kind), "--prompt", "w1 w2 w3")
    assert (done.code, done.out) == (3, "")
    assert reason in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_model_whose_layers_all_slide_runs_with_full(occamkv, folder_of):
    done = occamkv("run", folder_of("all sliding"), "--prompt", "w1 w2 w3", "--method", "full", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    assert "nothing was quantized" in done.out


def test_a_model_without_attention_and_full_is_refused_in_one_line(occamkv, folder_of):
    done = occamkv("run", folder_of("no attention"), "--prompt", "w1 w2 w3", "--method", "full")
    assert (done.code, done.out) == (3, "")
    assert len(done.err.strip().splitlines()) == 1


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Make stderr a terminal, as far as the command can tell."""
    terminal = Console(stderr=True, force_terminal=True, force_interactive=True, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr("occamkv.cli.run.err", terminal)


def short_run(occamkv, folder_of, prompt_of):
    return occamkv("run", folder_of("packable"), "--prompt-file", prompt_of(PROMPT), "--max-new-tokens", 6)


def test_progress_is_shown_on_a_terminal_while_the_prompt_is_read_and_compared(
    occamkv, folder_of, prompt_of, on_a_terminal
):
    done = short_run(occamkv, folder_of, prompt_of)
    for step in ("loading", f"reading {PROMPT} tokens", "comparing"):
        assert step in done.err


def test_without_a_terminal_stderr_stays_empty(occamkv, folder_of, prompt_of):
    assert short_run(occamkv, folder_of, prompt_of).err == ""


def test_the_text_goes_to_stdout_in_one_line_beside_the_progress(
    occamkv, folder_of, prompt_of, generated, on_a_terminal
):
    done, text = short_run(occamkv, folder_of, prompt_of), generated(6, "occam")
    assert done.out.startswith(text + "\n")
    assert text.split()[-1] not in done.err


def test_the_text_is_the_first_thing_on_stdout(occamkv, folder_of, prompt_of, generated):
    assert short_run(occamkv, folder_of, prompt_of).out.startswith(generated(6, "occam") + "\n")


def test_a_model_folder_is_left_as_it_was(occamkv, copy_of):
    folder = copy_of("packable")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert occamkv("run", folder, "--prompt", "w1 w2", "--max-new-tokens", 2).code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shutil.rmtree(folder)


def test_a_model_that_sdpa_cannot_run_is_compared_all_the_same(run):
    data = run("--max-new-tokens", 2, kind="learned sinks")
    assert data["cache"]["packed_layers"] == 1
    assert data["fidelity"]["positions"] > 100
    assert data["full_cache"] is None
