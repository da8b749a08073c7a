"""Methods of other packages: found by their entry points, used like ours; a broken one is refused alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from occamkv import METHOD_NAMES, method
from occamkv.cache import LayerPlan, Plan
from occamkv.errors import UnsupportedFormat
from occamkv.methods import method_names, registry
from occamkv.methods.names import parse_name
from paper_formulas import relative_error, some_kv

GOOD = """
from occamkv import Format, Method
METHOD = Method("their_kv", Format(k_bits=3, k_group=64), v_rotation="hadamard", source="somebody, arXiv:0000.00000")
SECOND = Method("their_kv_small", Format(k_group=128), source="somebody")
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch) -> Install:
    """Install a distribution: modules by name, and lines of its entry point group."""

    def forget() -> None:
        registry._foreign.cache_clear()
        registry.default_method.cache_clear()

    def install(
        *entries: str, distribution: str = "theirs", group: str = registry.ENTRY_POINTS, **modules: str
    ) -> None:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries, ""]))
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    monkeypatch.undo()
    forget()


def install_good(install: Install, number: int) -> None:
    """Under a module name of its own, since Python keeps modules."""
    module = f"their_kv_{number}"
    install(f"their_kv = {module}:METHOD", f"their_kv_small = {module}:SECOND", **{module: GOOD})


def test_a_foreign_method_stands_behind_ours_and_is_read_written_and_used(install):
    assert method_names() == METHOD_NAMES
    install_good(install, 1)
    assert method_names() == (*METHOD_NAMES, "their_kv", "their_kv_small")
    theirs = method("their_kv")
    assert (theirs.format.k_bits, theirs.v_rotation) == (3, "hadamard")
    assert str(theirs) == "their_kv"
    assert str(method("their_kv_k2v4_g32_m8_roll")) == "their_kv_k2v4_g32_m8_roll"
    assert str(method("their_kv_k3v2_g64x32_block")) == "their_kv"
    assert str(method("their_kv_small_g128", clip=0.9)) == "their_kv_small+"
    k, v = some_kv(2, 64)
    assert relative_error(theirs.decode(theirs.encode(k, v))[0], k) < 0.3


def test_an_unknown_name_is_told_of_foreign_methods_too(install):
    install_good(install, 2)
    with pytest.raises(UnsupportedFormat, match=r"did you mean 'their_kv'\? .*rtn, full, their_kv, their_kv_small"):
        method("theirkv")


def test_a_plan_holds_a_foreign_method_and_says_so_when_it_is_gone(install, monkeypatch):
    install_good(install, 3)
    made = Plan(
        (LayerPlan(0, method("their_kv_k4v4", pins="first:4", clip=0.9)), LayerPlan(1, method("oscar"))),
        model_type="some",
        fingerprint="abc",
    )
    data = json.loads(json.dumps(made.to_json()))
    assert data["layers"][0]["method"] == "their_kv_k4v4"
    assert Plan.from_json(data) == made
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    registry._foreign.cache_clear()
    with pytest.raises(UnsupportedFormat, match="unknown method 'their_kv_k4v4'"):
        Plan.from_json(data)


BROKEN = {
    "a module that is not there": ("no_such_module_at_all:METHOD", "cannot be loaded: No module named"),
    "a name that is not there": ("their_broken:MISSING", "cannot be loaded: .*MISSING"),
    "a module that imports what is not there": ("their_importer:METHOD", "cannot be loaded: No module named 'not_th"),
    "a string": ("their_broken:TEXT", "is str ''; allowed: a Method whose name"),
    "a function": ("their_broken:make", "is function ''; allowed: a Method whose name"),
    "the class": ("their_broken:Method", "is type ''; allowed: a Method whose name"),
    "a method of another name": ("their_broken:OTHER", "is Method 'other'; allowed: a Method whose name"),
}
BROKEN_MODULE = """
from occamkv import Format, Method
TEXT = "their_broken"
OTHER = Method("other", Format())
def make():
    return OTHER
"""


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_foreign_method_is_refused_in_a_sentence_and_disturbs_no_other(install, what):
    target, message = BROKEN[what]
    install(
        f"their_broken = {target}",
        their_broken=BROKEN_MODULE,
        their_importer="import not_there_either",
    )
    install("fine = their_fine:METHOD", distribution="fine", their_fine=GOOD.replace("their_kv", "fine"))
    for name in ("their_broken", "their_broken_k3v3"):
        with pytest.raises(UnsupportedFormat, match=message) as refusal:
            method(name)
        assert "their_broken" in str(refusal.value)
        assert target in str(refusal.value)
    assert str(method("fine_k4v4")) == "fine_k4v4"
    assert [str(method(name)) for name in METHOD_NAMES] == list(METHOD_NAMES)
    assert str(parse_name("oscar_k3v2_g128")) == "oscar_k3v2_g128"


ODD_NAMES = ("Theirs", "their-kv", "9kv", "their__kv", "_theirs")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_no_method_name_can_hold_is_refused(install, name):
    module = f"odd_{ODD_NAMES.index(name)}"
    text = f'from occamkv import Format, Method\nMETHOD = Method("{name}", Format())\n'
    install(f"{name} = {module}:METHOD", **{module: text})
    with pytest.raises(UnsupportedFormat, match="allowed: a Method whose name, in lower case"):
        method(name)


def test_a_foreign_method_with_one_of_our_names_is_ignored(install):
    text = 'from occamkv import Format, Method\nMETHOD = Method("oscar", Format(k_bits=4))\n'
    install("oscar = their_oscar:METHOD", "full = their_oscar:METHOD", their_oscar=text)
    assert method_names() == METHOD_NAMES
    assert method("oscar").format.k_bits == 2
    assert method("full").format is None


def test_entry_points_of_another_group_are_not_methods(install):
    install("their_kv = their_other:METHOD", group="occamkv.somethings", their_other=GOOD)
    assert method_names() == METHOD_NAMES


def test_nothing_foreign_is_imported_until_it_is_asked_for(install, capsys):
    install("their_loud = their_loud:METHOD", their_loud=f"print('imported')\n{GOOD.replace('their_kv', 'their_loud')}")
    assert "their_loud" in method_names()
    assert str(method("kivi")) == "kivi"
    assert capsys.readouterr().out == ""
    assert str(method("their_loud")) == "their_loud"
    assert capsys.readouterr().out == "imported\n"
