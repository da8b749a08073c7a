"""`benchmarks/gpu_run.sh` without a GPU: its commands exist, a failed step does not stop it, its files are as named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None or shutil.which("timeout") is None, reason="needs bash and timeout")

STUB = """#!{python}
import json, sys, time
from pathlib import Path
words = sys.argv[1:]
with Path("{calls}").open("a") as file:
    file.write(json.dumps(words) + "\\n")
if words[-1] == "import matplotlib":
    sys.exit({plots})
for word in words:
    if word.endswith((".json", ".png")):
        Path(word.removeprefix("--plot=")).write_text("made")
time.sleep({seconds})
sys.exit({fails})
"""


def run(folder: Path, *, fails="0", plots=0, seconds=0, **environment):
    """Run the script with a stub for Python; return exit code, what the stub was called with, and the files."""
    calls, stub, out = folder / "calls", folder / "stub", folder / "out"
    stub.write_text(STUB.format(python=sys.executable, calls=calls, fails=fails, plots=plots, seconds=seconds))
    stub.chmod(0o755)
    tools = folder / "tools"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (tools / name).write_text(f'#!{BASH}\necho {name} "$@" >> {folder}/tools.calls\n')
        (tools / name).chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    given = os.environ | {"PYTHON": str(stub), "PATH": path} | environment
    done = subprocess.run([BASH, SCRIPT, out], env=given, capture_output=True, text=True, check=False)
    made = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    return done, made, {path.name: path.read_text() for path in out.iterdir()}


def named_files() -> set[str]:
    """The files that the script's head promises."""
    return set(re.search(r"^# +(log\.txt .*)$", SCRIPT.read_text(), re.M)[1].split())


def test_all_steps_run_and_all_named_files_come_out(tmp_path):
    done, calls, files = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(files) == named_files()
    assert len(files) <= 8
    kinds = [words[words.index("bench") + 1] for words in calls if "bench" in words]
    assert kinds == ["attend", "encode", "decode"]
    assert "FAILED" not in files["log.txt"] and "left out" not in files["log.txt"].lower()
    tools = (tmp_path / "tools.calls").read_text()
    assert [tools.count(word) for word in ("memcheck", "racecheck", "--clock-control none")] == [1, 1, 3]
    assert {int(d) for d in re.findall(r"--head-dim (\d+)", tools)} == {64, 128, 256}


def test_a_failed_step_is_noted_and_the_others_run(tmp_path):
    done, calls, files = run(tmp_path, fails="7 * ('attend' in words)")
    assert done.returncode == 1
    assert re.findall("FAILED (.*): exit code (.*) after", files["log.txt"]) == [("bench attend", "7")]
    assert any("decode" in words for words in calls)


@pytest.mark.emulator
def test_a_step_that_hangs_is_ended_and_the_rest_left_out(tmp_path):
    done, calls, files = run(tmp_path, seconds=30, GPU_RUN_SECONDS="2")
    assert done.returncode == 1
    assert "FAILED environment: exit code 124" in files["log.txt"]
    assert files["log.txt"].count("LEFT OUT") == 10
    assert len(calls) <= 4  # the first step, and what asks for matplotlib


def test_without_matplotlib_there_are_no_figures(tmp_path):
    done, _, files = run(tmp_path, plots=1)
    assert done.returncode == 0
    assert named_files() - set(files) == {"bench-attend.png", "bench-decode.png"}


def test_steps_fit_eight_minutes():
    limits = [int(n) for n in re.findall(r'^ *step (?:"[^"]*"|\w+) (\d+) ', SCRIPT.read_text(), re.M)]
    assert len(limits) == 8
    assert sum(limits) + limits[3] + 2 * limits[-1] <= 480 + 60  # memcheck and racecheck, ncu three times
    assert "GPU_RUN_SECONDS:-480" in SCRIPT.read_text()


def options_missing(words: list[str]) -> list[str]:
    """Options of an `occamkv` command that the command line does not know."""
    import typer

    from occamkv.cli.app import app

    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):
        return [" ".join(words)]
    known = {name for parameter in command.params for name in parameter.opts}
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def test_every_command_and_option_exists(tmp_path):
    import occamkv.cli  # noqa: F401

    _, calls, _ = run(tmp_path)
    ours = [words[2:] for words in calls if words[0] == "-c" and "occamkv.cli" in words[1]]
    assert [words[0] for words in ours] == ["doctor", "bench", "bench", "bench"]
    assert [options_missing(words) for words in ours] == [[], [], [], []]
    named = [word for words in calls for word in words if word.startswith(("tests", "benchmarks/"))]
    assert named and all((ROOT / name).exists() for name in named)


def test_twin_an_option_that_is_not_there_is_seen():
    import occamkv.cli  # noqa: F401

    assert options_missing(["bench", "attend", "--devices", "cuda"]) == ["--devices"]
    assert options_missing(["bench", "atend", "--device", "cuda"]) != []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.emulator
def test_without_a_gpu_its_tests_fail_and_are_not_skipped_in_silence():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu_run.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "finds no NVIDIA GPU" in done.stdout + done.stderr


@pytest.mark.emulator
def test_the_case_for_checkers_runs_on_a_cpu():
    command = [sys.executable, ROOT / "benchmarks" / "gpu_case.py", "--device", "cpu", "--context", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout and len(re.findall(r"\d+\.\d+", done.stdout)) == 2


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SCRIPT], check=True)
