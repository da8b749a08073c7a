"""The house rules that no linter knows.

A guard takes the root of a repository and returns complaints. Each has twins: bad trees that it must complain about.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES, MAX_SOURCE_LINES, MAX_STATEMENTS = 400, 31500, 50
MIN_BODY_NODES = 12  # shorter bodies, such as `return self.pages.nbytes`, may be alike by chance
SOURCE_SUFFIXES = {".py", ".c", ".h", ".cpp", ".inc", ".cu", ".cuh"}
MODEL_FAMILIES = re.compile(r"smollm|gemma|llama|qwen|mistral|gpt[-_ ]?oss|phi-?3", re.IGNORECASE)
ARXIV_ID = re.compile(r"arxiv:\d{4}\.\d{4,5}", re.IGNORECASE)


def texts(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield every text file of the package with its path relative to the repository."""
    for path in sorted((root / "src" / "occamkv").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and b"\0" not in (data := path.read_bytes()):
            yield path.relative_to(root), data.decode()


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, list[ast.stmt]]]:
    """Yield where each Python function stands, the function, and its body without the docstring."""
    for path, text in texts(root):
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                yield f"{path}:{node.lineno} {node.name}", node, body


def file_sizes(root: Path) -> list[str]:
    lines = {path: len(text.splitlines()) for path, text in texts(root) if path.suffix in SOURCE_SUFFIXES}
    long = [f"{path} has {n} lines; at most {MAX_FILE_LINES}" for path, n in lines.items() if n > MAX_FILE_LINES]
    total = sum(lines.values())
    return long + ([f"src has {total} lines; at most {MAX_SOURCE_LINES}"] if total > MAX_SOURCE_LINES else [])


def function_sizes(root: Path) -> list[str]:
    sizes = [(at, sum(isinstance(n, ast.stmt) for s in body for n in ast.walk(s))) for at, _, body in functions(root)]
    return [f"{at} has {n} statements; at most {MAX_STATEMENTS}" for at, n in sizes if n > MAX_STATEMENTS]


def repeated_bodies(root: Path) -> list[str]:
    seen: dict[str, str] = {}
    complaints = []
    for at, node, body in functions(root):
        for own_name in (n for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == node.name):
            own_name.id = "itself"
        key = "\n".join(ast.dump(s) for s in body)
        if sum(not isinstance(n, ast.expr_context) for s in body for n in ast.walk(s)) < MIN_BODY_NODES:
            continue
        if key in seen:
            complaints.append(f"{at} has the body of {seen[key]}; keep one and call it")
        seen.setdefault(key, at)
    return complaints


def model_names(root: Path) -> list[str]:
    found = [
        (path, f"{path}:{number} names a model family ({match[0]})")
        for path, text in texts(root)
        for number, line in enumerate([path.name, *text.splitlines()])
        if (match := MODEL_FAMILIES.search(line))
    ]
    cli_data = sorted({path for path, _ in found if path.suffix == ".json" and path.parent.name == "cli"})
    return [complaint for path, complaint in found if path not in cli_data[:1]]


def methods_without_paper_or_test(root: Path) -> list[str]:
    tests = [p.read_text() for p in (root / "tests").rglob("*.py") if p.name != Path(__file__).name]
    complaints = []
    for path in sorted((root / "src" / "occamkv" / "methods").glob("*.py")):
        tree = ast.parse(path.read_text())
        assigned = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
        annotated = [n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        if "METHOD" not in assigned + annotated:
            continue
        if not ARXIV_ID.search(ast.get_docstring(tree) or ""):
            complaints.append(f"{path.name}: the module docstring names no paper (arXiv:0000.00000)")
        if not any(re.search(rf"""["']{path.stem}(?![a-z])""", test) for test in tests):
            complaints.append(f"{path.name}: no test names {path.stem!r}")
    return complaints


GUARDS = [file_sizes, function_sizes, repeated_bodies, model_names, methods_without_paper_or_test]


@pytest.mark.parametrize("guard", GUARDS)
def test_house(guard):
    complaints = guard(ROOT)
    assert not complaints, "\n".join(complaints)


BODY = "    total = sum(x * x for x in values)\n    return total / len(values)\n"
RECURSION = "def f(x):\n    return f(x - 1) + f(x - 2) if x > 1 else x\n"
BAD_TREES = {
    "long-file": (file_sizes, {"a.py": "x = 1\n" * 401}),
    "long-src": (file_sizes, {f"a{i}.cpp": "//\n" * 399 for i in range(79)}),
    "long-function": (function_sizes, {"a.py": "def f(x):\n" + "    x += 1\n" * 51}),
    "same-body": (repeated_bodies, {"a.py": 'def f(values):\n    "A."\n' + BODY, "b.py": "def g(values):\n" + BODY}),
    "same-recursion": (repeated_bodies, {"a.py": RECURSION, "b.py": RECURSION.replace("f(", "g(")}),
    "model-in-comment": (model_names, {"a.py": "# as Llama does it\n"}),
    "model-in-file-name": (model_names, {"kernels/qwen.py": ""}),
    "models-in-two-data-files": (model_names, {"cli/a.json": '"gemma"', "cli/b.json": '"gemma"'}),
    "model-data-outside-cli": (model_names, {"evals/a.json": '"SmolLM2"'}),
    "no-paper": (methods_without_paper_or_test, {"methods/kivi.py": '"""KIVI."""\nMETHOD = 1\n'}),
    "no-test": (methods_without_paper_or_test, {"methods/new.py": '"""New, arXiv:2402.02750."""\nMETHOD: int = 1\n'}),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in ({"tests/test_a.py": '"kivi_k2v2"'} | {f"src/occamkv/{n}": t for n, t in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_guard_can_fail(name, tmp_path):
    guard, files = BAD_TREES[name]
    write_tree(tmp_path, files)
    counts = Counter({g.__name__: len(g(tmp_path)) for g in GUARDS})
    assert +counts == {guard.__name__: 1}, "the bad tree must break its own guard, once, and no other"


def test_a_good_tree_passes(tmp_path):
    write_tree(tmp_path, {"cli/models.json": '"gemma"', "methods/kivi.py": '"""arXiv:2402.02750."""\nMETHOD = 1\n'})
    assert [complaint for guard in GUARDS for complaint in guard(tmp_path)] == []
