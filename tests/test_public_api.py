"""The public API is what tests/public_api.txt says.

After a change on purpose: `python tests/test_public_api.py --update`.
"""

import sys
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(__file__).with_name("public_api.txt")
UPDATE = "python tests/test_public_api.py --update"
PACKAGES = (
    "occamkv.formats",
    "occamkv.methods",
    "occamkv.ops",
    "occamkv.cache",
    "occamkv.kernels",
    "occamkv.integrations.transformers",
    "occamkv",  # last, so that a name it exports again is one line that points to its home
)


def public_api(source: Path) -> list[str]:
    """Return one line for each public name below `source`, sorted: `name(signature)`. Nothing is imported.

    Public are the names in `__all__` of `PACKAGES` (those that exist) and the public members of exported classes.
    """
    loader = griffe.GriffeLoader(search_paths=[source], allow_inspection=False)
    root = loader.load("occamkv")
    loader.resolve_aliases(implicit=True, external=False)
    homes: dict[str, str] = {}
    lines: list[str] = []
    for package in PACKAGES:
        inner = package.removeprefix("occamkv").lstrip(".")
        if inner and not has_member(root, inner):
            continue
        module = root[inner] if inner else root
        for name in map(str, module.exports or []):
            path = f"{package}.{name}"
            target = definition(module, name)
            home = homes.setdefault(target.path, path)
            lines += describe(path, target) if home == path else [f"{path} = {home}"]
    return sorted(lines)


def has_member(root: griffe.Module, path: str) -> bool:
    try:
        root[path]
    except KeyError:
        return False
    return True


def definition(parent: griffe.Object, name: str) -> griffe.Object:
    """Return what a name of a module or class stands for, wherever it is defined."""
    try:
        item = parent.all_members[name]
        item = item.final_target if item.is_alias else item
        if item.is_module:  # a submodule hides the function of the same name: read the file alone
            item = griffe.visit(parent.path, filepath=parent.filepath, code=parent.filepath.read_text()).members[name]
            if item.is_alias:
                home, _, name = item.target_path.rpartition(".")
                item = definition(parent.modules_collection[home], name)
        return item
    except (KeyError, griffe.AliasResolutionError):
        raise LookupError(
            f"{parent.path}.{name} is in __all__, but no static import or definition leads to it. "
            "If it is loaded lazily, also import it under TYPE_CHECKING."
        ) from None


def describe(path: str, item: griffe.Object) -> list[str]:
    """Return the lines of one object: itself and, of a class, its public members, inherited ones included.

    An attribute that the constructor sets under the same name (a dataclass field) is said by the signature already.
    """
    if item.is_class:
        bases = f" < {', '.join(map(str, item.bases))}" if item.bases else ""
        members = item.all_members
        said = {p.name for p in members["__init__"].parameters} if "__init__" in members else set()
        public = [n for n in members if not n.startswith("_") and not (n in said and members[n].is_attribute)]
        lines = [line for n in public for line in describe(f"{path}.{n}", definition(item, n))]
        return [(item.signature(name=path) or f"{path}()") + bases, *lines]
    if item.is_function:
        marks = sorted(item.labels & {"classmethod", "staticmethod", "async"})
        return [item.signature(name=path) + "".join(f"  [{mark}]" for mark in marks)]
    return [f"{path}: {item.annotation}" if getattr(item, "annotation", None) else path]


def test_public_api_is_the_one_written_down():
    written = SNAPSHOT.read_text().splitlines() if SNAPSHOT.exists() else []
    found = public_api(ROOT / "src")
    gone, new = sorted(set(written) - set(found)), sorted(set(found) - set(written))
    changes = [f"- {line}" for line in gone] + [f"+ {line}" for line in new]
    assert not changes, "\n".join(["the public API changed:", *changes, f"If that is on purpose: {UPDATE}"])
    assert written == found, f"tests/public_api.txt is not sorted. Write it with: {UPDATE}"


BASE = "class Base:\n    def shared(self) -> int: ...\n"
HOME = (
    BASE
    + "class Thing(Base):\n"
    + '    def __init__(self, size: int, *, name: str = "x") -> None: ...\n'
    + "    @property\n    def nbytes(self) -> int: ...\n    def _hidden(self): ...\n"
)
CACHE_INIT = 'from occamkv.cache.thing import Thing\n__all__ = ["Thing"]\n'
INIT = 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from occamkv.cache import Thing\n__all__ = ["Thing"]\n'


def write_package(folder: Path, home: str) -> Path:
    (folder / "occamkv" / "cache").mkdir(parents=True, exist_ok=True)
    (folder / "occamkv" / "__init__.py").write_text(INIT)
    (folder / "occamkv" / "cache" / "__init__.py").write_text(CACHE_INIT)
    (folder / "occamkv" / "cache" / "thing.py").write_text(home)
    return folder


def test_public_api_of_a_small_package(tmp_path):
    assert public_api(write_package(tmp_path, HOME)) == [
        "occamkv.Thing = occamkv.cache.Thing",
        "occamkv.cache.Thing(size: int, *, name: str = 'x') < Base",
        "occamkv.cache.Thing.nbytes: int",
        "occamkv.cache.Thing.shared() -> int",
    ]


@pytest.mark.parametrize("old, new", [("size: int", "size: float"), ("def shared", "def other"), ("*, ", "")])
def test_a_changed_signature_changes_the_lines(tmp_path, old, new):
    before = public_api(write_package(tmp_path, HOME))
    assert public_api(write_package(tmp_path, HOME.replace(old, new))) != before


def test_a_function_named_like_its_module_is_found(tmp_path):
    write_package(tmp_path, "def thing(x: int) -> int: ...\nThing = 1\n")
    (tmp_path / "occamkv" / "__init__.py").write_text("from occamkv.cache import thing\n__all__ = ['thing']\n")
    for line in ("from occamkv.cache.thing import thing", "def thing(x: int) -> int: ..."):
        (tmp_path / "occamkv" / "cache" / "__init__.py").write_text(f"{line}\n__all__ = ['thing']\n")
        assert public_api(tmp_path) == ["occamkv.cache.thing(x: int) -> int", "occamkv.thing = occamkv.cache.thing"]


def test_a_name_that_nothing_defines_is_refused(tmp_path):
    with pytest.raises(LookupError, match=r"occamkv\.cache\.Thing is in __all__"):
        public_api(write_package(tmp_path, "class Other: ...\n"))


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: {UPDATE}")
    SNAPSHOT.write_text("\n".join(public_api(ROOT / "src")) + "\n")
    print(f"wrote {SNAPSHOT}")
