"""How things are drawn: our style and nobody else's, figures that fit any page, colours that follow its ground."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from occamkv import drawing
from occamkv.errors import UnsupportedInput

matplotlib = pytest.importorskip("matplotlib", reason="needs: pip install 'occamkv[plots]'")


def figure(level: float = 0.5):
    """Return a figure with a line, a picture of cells and a clipped marker."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(3, 2))
    axes = drawn.add_subplot()
    axes.plot([0, 1], [level, 1], "-o", color=drawing.light(0))
    axes.pcolormesh([[0, level]], rasterized=True)
    return drawn


def svg(title: str = "t", level: float = 0.5) -> str:
    with drawing.house_style(title):
        return drawing.svg(figure(level), title)


def loaded_after(module: str) -> bool:
    """Return whether a fresh interpreter has loaded matplotlib after `import module`."""
    code = f"import sys, {module}; print('matplotlib' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_matplotlib_is_loaded_only_when_something_is_drawn():
    assert not loaded_after("occamkv.drawing")
    assert loaded_after("occamkv.bench.plots"), "the check can fail"


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    drawing.need_matplotlib("a page")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedInput, match=r"^a page draws with matplotlib. Run: pip install 'occamkv\[plots\]'"):
        drawing.need_matplotlib("a page")


def test_the_users_settings_neither_change_a_figure_nor_are_changed():
    plain = svg()
    theirs = {"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "savefig.bbox": "tight"}
    with matplotlib.rc_context(theirs):
        assert svg() == plain
        assert {name: matplotlib.rcParams[name] for name in theirs} == theirs


def test_the_same_data_give_the_same_bytes_and_other_data_others(tmp_path):
    assert svg() == svg() != svg(level=0.6)
    for name, level in {"a": 0.5, "b": 0.5, "c": 0.6}.items():
        with drawing.house_style():
            drawing.save_png(figure(level), tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a.startswith(b"\x89PNG")
    assert a == b != c


def test_two_figures_on_one_page_share_no_id_and_name_themselves():
    ids = [set(re.findall(r'\bid="([^"]+)"', svg(title))) for title in ("one", 'two <b a="x">&')]
    assert ids[0] and not ids[0] & ids[1]
    root = ElementTree.fromstring(svg('two <b a="x">&'))
    assert (root.get("role"), root.get("aria-label")) == ("img", 'two <b a="x">&')


def test_every_colour_has_a_dark_twin():
    assert drawing.colour(0) in svg()
    assert drawing.colour(drawing.COLOURS + 1) == drawing.colour(1)
    known = set(re.findall(r"(--[\w-]+):#", drawing.dark_colours()))
    assert {f"--method-{index}" for index in range(drawing.COLOURS)} < known
    assert set(re.findall(r"var\((--[\w-]+)", svg())) <= known


@pytest.mark.parametrize(("value", "shown"), [(1e-30, True), (0.0, False), (-1.0, False), (float("inf"), False)])
def test_positive_is_what_a_logarithmic_axis_can_show(value, shown):
    assert drawing.positive(value) is shown
