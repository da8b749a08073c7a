"""The figures: things stand where the numbers say, names do not cover each other, the same data give the same bytes."""

import itertools
import math
import re
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occamkv.drawing import colour, dark_colours
from occamkv.evals import plots
from occamkv.evals.plots import Box, Curve, Point

POINTS = [
    Point("rtn", 0, 3.0, 0.4, (0.3, 0.5)),
    Point("oscar", 1, 3.083, 0.08),
    Point("occam", 2, 2.541, 0.01, (0.009, 0.011)),
]
LINES = [Curve("a", 0, [0, 10, 20], [0.1, 0.2, 0.4]), Curve("b", 1, [0, 10, 20], [0.01, 0.0, 0.02])]


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("text")]


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Return where the markers of this colour stand, in pixels from the top left."""
    found = [node for node in ElementTree.fromstring(svg).iter("use") if f"fill: {colour}" in node.get("style", "")]
    return [(float(node.get("x")), float(node.get("y"))) for node in found]


def figures() -> list[str]:
    heat = plots.heat_map({(768, 0.5): 0.25}, title="h", like=[(768, 0.5), (1536, 1.0)])
    return [
        plots.bits_and_kl(POINTS, title="t"),
        *plots.curves(LINES, x_label="x", y_label="y"),
        heat,
        plots.heat_scale(),
    ]


def test_the_same_data_give_the_same_bytes():
    assert figures() == figures()


def test_other_data_give_other_bytes():
    moved = [*POINTS[:2], Point("occam", 2, 2.541, 0.011)]
    assert plots.bits_and_kl(moved, title="t") != plots.bits_and_kl(POINTS, title="t")


def test_the_users_settings_neither_change_the_figures_nor_are_changed():
    plain = figures()
    theirs = {"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "savefig.bbox": "tight", "figure.dpi": 200}
    with matplotlib.rc_context(theirs):
        assert figures() == plain
        assert {name: matplotlib.rcParams[name] for name in theirs} == theirs


def test_no_pyplot():
    figures()
    assert "matplotlib.pyplot" not in sys.modules


def test_every_figure_is_an_image_with_a_name():
    for svg in figures():
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")


def test_every_colour_has_a_dark_twin():
    variables = {name for svg in figures() for name in re.findall(r"var\((--[\w-]+)", svg)}
    assert {"--figure-ink", "--figure-muted", "--method-0", "--method-2"} <= variables
    assert variables <= set(re.findall(r"(--[\w-]+):#", dark_colours()))
    for svg in figures()[:3]:
        bare = re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)
        assert bare == [], "a colour that does not change with the ground"


@pytest.mark.parametrize("name", ['<b a="x">&', "$x$ \\frac{", "_hidden", "日本", "a  b", "x" * 200])
def test_any_name_can_be_drawn(name):
    svg = plots.bits_and_kl([Point(name, 0, 3.0, 0.1)], title=name)
    assert ElementTree.fromstring(svg).get("aria-label") == name
    shown = name if len(name) < 30 else name[:29] + "…"
    assert shown in texts(svg)


def test_points_stand_where_their_numbers_say():
    svg = plots.bits_and_kl(POINTS, title="t")
    places = [marks(svg, colour(p.colour))[0] for p in POINTS]
    for (one, (x1, y1)), (other, (x2, y2)) in itertools.combinations(zip(POINTS, places, strict=True), 2):
        per_bit = (places[1][0] - places[0][0]) / 0.083
        per_factor = (places[1][1] - places[0][1]) / math.log(0.4 / 0.08)
        assert x2 - x1 == pytest.approx(per_bit * (other.bits - one.bits), abs=0.1)
        assert y2 - y1 == pytest.approx(per_factor * math.log(one.kl / other.kl), abs=0.1)
    assert per_bit > 0 and per_factor > 0, "more bits to the right, less KL further down"


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(pairs):
    points = [Point(str(i), i, bits, kl) for i, (bits, kl) in enumerate(pairs)]
    front = {(p.bits, p.kl) for p in plots.pareto(points)}
    unbeaten = {
        (bits, kl) for bits, kl in pairs if not any(b <= bits and k <= kl and (b, k) != (bits, kl) for b, k in pairs)
    }
    assert front == unbeaten


FRAME = Box(0, 0, 400, 300)
SIZE = (60, 14)


def clashes(boxes: list[Box | None], taken: list[Box]) -> int:
    """Return how many pairs of labels, or of a label and what is taken, share a pixel."""
    cells = [
        {(x, y) for x in range(int(b.left), math.ceil(b.right)) for y in range(int(b.bottom), math.ceil(b.top))}
        for b in boxes
        if b is not None
    ]
    others = [
        {(x, y) for x in range(int(b.left) + 1, int(b.right)) for y in range(int(b.bottom) + 1, int(b.top))}
        for b in taken
    ]
    inner = [{(x, y) for x, y in c if {(x - 1, y - 1), (x + 1, y + 1)} <= c} for c in cells]
    return sum(bool(a & b) for a, b in itertools.combinations(inner, 2)) + sum(
        bool(a & b) for a in inner for b in others
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(10, 390), st.integers(10, 290)), min_size=1, max_size=14))
def test_labels_cover_nothing_and_stay_inside(anchors):
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    boxes = plots.place_labels(anchors, [SIZE] * len(anchors), frame=FRAME, taken=taken)
    assert clashes(boxes, taken) == 0
    assert all(box.inside(FRAME) for box in boxes if box is not None)
    assert boxes[0] is not None or len(anchors) > 8, "the first label finds a place unless it is crowded"


def test_labels_that_are_all_put_to_the_right_would_clash():
    anchors = [(100, 100), (105, 104)]
    taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    naive = [Box(x + 8, y - 7, x + 68, y + 7) for x, y in anchors]
    assert clashes(naive, taken) > 0
    assert None not in plots.place_labels(anchors, [SIZE] * 2, frame=FRAME, taken=taken)


def test_a_label_without_room_is_left_out():
    assert plots.place_labels([(5, 5)], [SIZE], frame=Box(0, 0, 30, 10), taken=[]) == [None]


def test_a_label_goes_over_the_front_only_if_it_must():
    right, everywhere = Box(100, 90, 400, 110), Box(0, 0, 400, 300)
    free, must = (
        plots.place_labels([(100, 100)], [SIZE], frame=FRAME, taken=[], avoid=[box])[0] for box in (right, everywhere)
    )
    assert not free.meets(right)
    assert must is not None


def test_names_of_points_are_in_the_figure():
    assert {"rtn", "oscar", "occam"} <= set(texts(plots.bits_and_kl(POINTS, title="t")))


def test_a_panel_for_each_line_on_the_same_axes():
    panels = plots.curves(LINES, x_label="position, tokens", y_label="KL, nats")
    assert len(panels) == 2
    assert texts(panels[0]) == texts(panels[1])
    assert {"position, tokens", "KL, nats"} <= set(texts(panels[0]))
    assert len(marks(panels[0], colour(0))) == 3
    assert len(marks(panels[1], colour(1))) == 2, "0 has no place on a logarithmic axis"


def test_a_line_that_cannot_be_shown_has_no_panel():
    assert len(plots.curves([*LINES, Curve("zero", 2, [0, 1], [0.0, math.nan])], x_label="x", y_label="y")) == 2


@pytest.mark.parametrize("ys", [[0.1, 0.1], [0.1, 0.101], [1e-6, 3.0], [123.0, 456.0]], ids=str)
def test_an_axis_has_at_least_two_numbers(ys):
    (panel,) = plots.curves([Curve("a", 0, [0, 1], ys)], x_label="x", y_label="y")
    left = [node for node in ElementTree.fromstring(panel).iter("text") if "text-anchor: end" in node.get("style")]
    assert 2 <= len(left) <= 9


def test_a_heat_map_shows_each_share_in_its_cell():
    shares = {(768, 0.0): 1.0, (768, 1.0): 0.25, (1536, 0.0): 0.5}
    svg = plots.heat_map(shares, title="t", like=[*shares, (1536, 1.0)])
    places = {
        "".join(node.itertext()): (float(node.get("x")), float(node.get("y")))
        for node in ElementTree.fromstring(svg).iter("text")
    }
    assert {"100", "25", "50", "768", "1536", "0", "1"} <= set(places)
    assert places["100"][0] == places["25"][0] < places["50"][0], "length goes to the right"
    assert places["100"][1] == places["50"][1] < places["25"][1], "depth goes down"


def test_the_missing_cell_is_empty():
    def cells(shares):
        svg = plots.heat_map(shares, title="t", like=[(1, 0.0), (2, 0.0)])
        return len(re.findall(r'style="fill: #[^"]*stroke: var\(--figure-ground', svg))

    assert cells({(1, 0.0): 1.0, (2, 0.0): 1.0}) == 2
    assert cells({(1, 0.0): 1.0}) == 1
