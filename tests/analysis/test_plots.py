"""The figures of an analysis show the numbers they were given, where they were given, and nothing that was not."""

import itertools
import math
from statistics import median

import pytest

from occamkv.analysis.columns import by_column, columns, error_ratios, furthest
from some_analysis_result import LENGTH, even_norm_result, low_norm_result

plots = pytest.importorskip("occamkv.analysis.plots", reason="needs: pip install 'occamkv[plots]'")

LIMITS = (0.1, 4.0)


def drawn(fill):
    """Return the axes after `fill` has drawn into them."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    fill(axes)
    return axes


def dots(axes) -> list[tuple[float, float, str]]:
    """Return place and colour of each single marker."""
    return [
        (*map(float, (line.get_xdata()[0], line.get_ydata()[0])), line.get_color())
        for line in axes.lines
        if line.get_marker() == "o" and len(line.get_xdata()) == 1
    ]


def heights(axes, *, points: int) -> list[list[float]]:
    """Return the y values of each line with so many points or more."""
    return [[float(y) for y in line.get_ydata()] for line in axes.lines if len(line.get_xdata()) >= points]


def test_columns_are_the_first_tokens_and_then_ever_longer_ranges_without_gaps():
    ranges = columns(range(LENGTH))
    assert ranges[:9] == [(i, i + 1) for i in range(8)] + [(8, 10)]
    assert all(end == first for (_, end), (first, _) in itertools.pairwise(ranges))
    lengths = [end - first for first, end in ranges]
    assert lengths == sorted(lengths)
    assert ranges[-1][0] < LENGTH <= ranges[-1][1]
    assert len(ranges) < 40


def test_a_column_holds_its_own_tokens_and_leaves_out_what_was_not_measured():
    values = [1.0] * 12
    values[9], values[3] = 5.0, math.nan
    found = {first: value for first, _, value in by_column(range(12), values, max)}
    assert found[8] == 5.0
    assert 3 not in found, "nothing measured is no column, not 0"
    assert {value for first, value in found.items() if first != 8} == {1.0}


@pytest.mark.parametrize(("values", "one"), [([0.5, 1.1, 1.9], 0.5), ([0.6, 1.1, 1.9], 1.9), ([1.0, 1.0], 1.0)])
def test_furthest_is_by_factor(values, one):
    assert furthest(values) == one


def test_norms_show_each_layer_and_mark_low_sinks_apart_from_others():
    layers = low_norm_result()["layers"]
    axes = drawn(lambda axes: plots.norms(axes, layers, limits=LIMITS))
    middles = [median(layer["profile"]["k_norm"]) for layer in layers]
    firsts = [ys[0] for ys in heights(axes, points=10)]
    assert firsts == pytest.approx(
        [layer["profile"]["k_norm"][0] / m for layer, m in zip(layers, middles, strict=True)]
    )
    marked = dots(axes)
    assert [y for _, y, _ in marked] == pytest.approx([0.25, 0.26, 0.27, 0.28])
    assert {x for x, *_ in marked} == {0.0}
    (low,) = {colour for *_, colour in marked}
    even = drawn(lambda axes: plots.norms(axes, even_norm_result()["layers"], limits=LIMITS))
    (ordinary,) = {colour for *_, colour in dots(even)}
    assert low != ordinary


def test_a_low_sink_that_is_an_exception_has_the_number_of_its_layer():
    def named(layers):
        axes = drawn(lambda axes: plots.norms(axes, layers, limits=LIMITS))
        return [note.get_text() for note in axes.texts if note.get_text().startswith("layer")]

    layers = even_norm_result()["layers"]
    assert named(layers) == []
    layers[3]["sinks"][0]["k_norm"] = 0.45
    assert named(layers) == ["layer 3"]
    assert named(low_norm_result()["layers"]) == []


def test_positions_stand_on_an_axis_that_makes_room_for_the_first_tokens():
    axes = drawn(lambda axes: plots.norms(axes, low_norm_result()["layers"], limits=LIMITS))
    at = [axes.transData.transform((position, 1))[0] for position in (0, 1, 100, 101)]
    assert at[1] - at[0] > 20 * (at[3] - at[2]) > 0
    assert [label.get_text() for label in axes.get_xticklabels()][:4] == ["0", "1", "2", "4"]


def test_slopes_are_errors_over_that_of_k_as_it_is_with_their_median():
    layers = low_norm_result()["layers"]
    axes = drawn(lambda axes: plots.slopes(axes, layers, limits=LIMITS))
    order = ("none", "rotation", "token_scale", "rotation+token_scale", "balanced+token_scale")
    assert heights(axes, points=5) == [
        pytest.approx([layer["errors"][name] / layer["errors"]["none"] for name in order]) for layer in layers
    ]
    both = median(layer["errors"]["rotation+token_scale"] for layer in layers) / 0.4
    said = [note.get_text() for note in axes.texts if note.get_text()]
    assert said[-1] == f"rotation \N{DIVISION SIGN}{0.75 / both:.1f}"
    assert said[:-1] == ["1.00", "0.90", "0.75", f"{both:.2f}", "0.25"]


def test_a_rotation_that_harms_is_told_as_a_factor_and_in_another_colour():
    def told(layers):
        axes = drawn(lambda axes: plots.slopes(axes, layers, limits=LIMITS))
        return axes.texts[-1].get_text(), axes.texts[-1].get_color()

    harm, help_ = told(even_norm_result()["layers"][1::2]), told(low_norm_result()["layers"])
    assert harm[0] == "rotation \N{MULTIPLICATION SIGN}3.9"
    assert harm[1] != help_[1]


def test_the_gain_of_rotation_stands_over_its_overlap():
    layers = low_norm_result()["layers"]
    for layer, overlap, gain in zip(layers, (0.1, 0.5, 1.2, 2.0), (0.3, 0.6, 1.5, 2.0), strict=True):
        layer |= {"query_overlap": overlap, "rotation_gain": gain}
    layers[2]["packs"] = False
    axes = drawn(lambda axes: plots.overlaps(axes, layers, limits=LIMITS, span=LIMITS))
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [
        (0.1, 0.3),
        (0.5, 0.6),
        (1.2, 1.5),
        (2, 2),
    ]
    assert [line.get_markerfacecolor() == "none" for line in marks] == [False, False, True, False]
    assert marks[0].get_markeredgecolor() == marks[1].get_markeredgecolor() != marks[3].get_markeredgecolor()


@pytest.mark.parametrize("errors", [None, {}, {"none": 0.0, "rotation": 1.0}, {"rotation": 1.0}])
def test_without_an_error_of_k_as_it_is_there_are_no_ratios(errors):
    assert error_ratios({"errors": errors}) == {}


def test_a_missing_error_is_left_out_not_drawn_as_zero():
    layer = low_norm_result()["layers"][0]
    layer["errors"]["balanced+token_scale"] = None
    assert list(error_ratios(layer)) == ["none", "rotation", "token_scale", "rotation+token_scale"]
    axes = drawn(lambda axes: plots.errors_by_layer(axes, [layer], limits=LIMITS))
    assert sorted(ys[0] for ys in heights(axes, points=1)) == pytest.approx([0.2, 0.3, 0.36, 0.4])


def test_layers_without_errors_are_a_grey_strip():
    layers = even_norm_result()["layers"]
    axes = drawn(lambda axes: plots.errors_by_layer(axes, layers, limits=LIMITS))
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 3]] * 5
    strips = sorted((patch.get_x(), patch.get_width()) for patch in axes.patches)
    assert strips == [(-0.5, 1.0), (1.5, 1.0)]
    whole = drawn(lambda axes: plots.errors_by_layer(axes, low_norm_result()["layers"], limits=LIMITS))
    assert not whole.patches


def test_attention_received_shows_each_layer_and_the_median():
    layers = low_norm_result()["layers"]
    layers[2]["profile"]["received"][0] = 0.9
    axes = drawn(lambda axes: plots.received(axes, layers, limits=(1e-4, 1)))
    assert [ys[0] for ys in heights(axes, points=10)] == [0.5, 0.5, 0.9, 0.5, 0.5]


SCALE = plots.Scale(0.25, 4, around_one=True, ticks=(0.25, 1, 4), label="ratio")


def cells(layers, key="k_norm", scale=SCALE):
    axes = drawn(lambda axes: plots.heat(axes, layers, key, scale))
    return axes, axes.collections[0].get_array()


def test_a_map_has_a_row_for_each_layer_and_shows_the_most_extreme_token_of_a_column():
    layers = low_norm_result()["layers"]
    layers[2]["profile"]["k_norm"][200] = 7.0
    axes, values = cells(layers)
    ranges = columns(range(LENGTH))
    at = next(i for i, (first, end) in enumerate(ranges) if first <= 200 < end)
    middle = median(layers[2]["profile"]["k_norm"])
    assert values.shape == (4, len(ranges))
    assert values[2, at] == pytest.approx(7.0 / middle)
    assert values[:, at].argmax() == 2
    assert values[3, 0] == pytest.approx(0.28 / median(layers[3]["profile"]["k_norm"]))
    top, bottom = (axes.transData.transform((0, row))[1] for row in (0, 3))
    assert top > bottom, "layer 0 is on top"


def test_a_layer_without_a_profile_is_missing_in_the_map_not_0():
    layers = low_norm_result()["layers"]
    layers[1]["profile"] = None
    layers[2]["profile"]["k_norm"][0] = None
    _, values = cells(layers)
    assert values.mask[1].all()
    assert values.mask[2].tolist() == [True] + [False] * (values.shape[1] - 1)
    assert not values.mask[[0, 3]].any()


def test_only_where_layers_differ_are_packed_ones_bold():
    def weights(layers):
        return [label.get_fontweight() for label in cells(layers)[0].get_yticklabels()]

    assert weights(even_norm_result()["layers"]) == ["normal", "bold"] * 2
    assert set(weights(low_norm_result()["layers"])) == {"normal"}


def test_steps_show_one_head_three_times():
    panel = low_norm_result()["panels"][0]
    axes = drawn(lambda axes: plots.steps(axes, panel))
    inner = axes.child_axes
    shown = [one.collections[0] for one in inner]
    assert [one.get_array().tolist() for one in shown] == [panel[key] for key in ("raw", "rotated", "scaled")]
    tops = [one.norm.vmax for one in shown]
    assert tops[0] == tops[1] > tops[2], "norms are kept by rotation, so the first two share their colours"


def test_a_profile_shows_norms_before_and_after_scaling():
    layer = low_norm_result()["layers"][0]
    axes = drawn(lambda axes: plots.profile(axes, layer, limits=LIMITS))
    scaled, before = heights(axes, points=10)
    assert set(scaled) == {1.0}
    assert before[0] == pytest.approx(0.25 / median(layer["profile"]["k_norm"]))
    layer["profile"]["k_norm_scaled"] = None
    axes = drawn(lambda axes: plots.profile(axes, layer, limits=LIMITS))
    assert len(heights(axes, points=10)) == 1


def test_a_figure_names_itself_and_the_same_data_give_the_same_bytes():
    def one(title):
        return plots.figure(title, lambda axes: plots.norms(axes, low_norm_result()["layers"], limits=LIMITS))

    assert 'aria-label="a &lt;b&gt;"' in one("a <b>")
    assert one("a") == one("a") != one("b")
