"""`import occamkv` is light: it loads neither torch nor an engine."""

import os
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers")


def heavy_after_import(module: str, *, folder: Path | None = None) -> list[str]:
    """Return the heavy packages that a fresh interpreter has loaded after `import module` (looked up in folder)."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    env = os.environ | ({"PYTHONPATH": str(folder)} if folder else {})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_occamkv_loads_nothing_heavy():
    assert heavy_after_import("occamkv") == []


def test_the_check_fails_when_a_module_imports_torch(tmp_path):
    (tmp_path / "imports_torch.py").write_text("import torch\n")
    assert heavy_after_import("imports_torch", folder=tmp_path) == ["torch"]
