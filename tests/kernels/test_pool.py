"""The thread pool of the native library, by its own checks in `tests/native`, compiled here."""

import shutil
import subprocess
from pathlib import Path

import pytest

from occamkv.kernels.cpu import library

POOL = Path(library.__file__).parent / "native" / "pool.cpp"
CHECKS = Path(__file__).parents[1] / "native"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MAIN = """
#include "checks.h"
int failures = 0;
int main() { check_pool(); return failures == 0 ? 0 : 1; }
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """The compiled checks, without a pool."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "main.cpp").write_text(MAIN)
    for source in (folder / "main.cpp", CHECKS / "check_pool.cpp"):
        build("-c", source, f"-I{CHECKS}", "-o", folder / f"{source.stem}.o")
    return folder


def build(*arguments: str | Path) -> None:
    subprocess.run([COMPILER, "-std=c++17", "-pthread", f"-I{POOL.parent}", *arguments], check=True)


def said_with(pool: str, folder: Path, target: Path) -> str:
    """Return what the checks say about this source of a pool; nothing if all is well."""
    (target / "pool.cpp").write_text(pool)
    build(target / "pool.cpp", *folder.glob("*.o"), "-o", target / "checks")
    done = subprocess.run([target / "checks"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr


def test_every_item_is_done_once_by_nested_and_concurrent_callers_and_in_a_child(checks, tmp_path):
    assert said_with(POOL.read_text(), checks, tmp_path) == ""


@pytest.mark.parametrize(
    ("code", "instead", "seen"),
    [
        pytest.param("current.store(nullptr, std::memory_order_relaxed);", "", "waitpid", id="a child keeps the pool"),
        pytest.param("std::fesetenv(FE_DFL_ENV)", "", "half > 0", id="flush to zero stays on"),
        pytest.param("next.fetch_add(1,", "next.fetch_add(2,", "each_once", id="items are left out"),
    ],
)
def test_the_checks_see_a_pool_that_is_wrong(checks, tmp_path, code, instead, seen):
    wrong = POOL.read_text().replace(code, instead)
    assert wrong != POOL.read_text()
    assert seen in said_with(wrong, checks, tmp_path)
