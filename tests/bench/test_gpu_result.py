"""Results of GPUs: the schema, and what the figures show."""

import copy

import pytest

import some_gpu_result
from occamkv.bench.result import check
from occamkv.errors import UnsupportedInput

KINDS = [*some_gpu_result.RESULTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_result_is_accepted(kind):
    check(some_gpu_result.RESULTS[kind]())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["gpu", "rows"])
def test_twin_a_field_that_is_missing_is_named(kind, place):
    result = copy.deepcopy(some_gpu_result.RESULTS[kind]())
    holder = result[place] if place == "gpu" else result[place][0]
    for name in [*holder]:
        if name == "ratio_step":
            continue
        kept = holder.pop(name)
        with pytest.raises(UnsupportedInput, match=f"lacks '{name}'.*occamkv bench {kind.removeprefix('gpu-')} "):
            check(result)
        holder[name] = kept
    check(result)


def test_a_result_without_rows_is_refused():
    with pytest.raises(UnsupportedInput, match="no rows"):
        check(some_gpu_result.attend_result() | {"rows": []})


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    from occamkv.bench import gpu_plots

    return gpu_plots


def test_each_method_has_a_line_of_ratios_and_one_of_shares(plots):
    result = some_gpu_result.attend_result()
    grid = plots.attend_grid(result["rows"])
    assert [[panel.title for panel in line] for line in grid] == [
        [f"{shape}, {name}" for shape in sorted(some_gpu_result.SHAPES)]
        for name in ("occam", "occam", "oscar", "oscar")
    ]
    for line, key in zip(grid, ("ratio", "share_of_read") * 2, strict=True):
        for panel in line:
            shape, name = panel.title.split(", ")
            for curve, batch in zip(panel.curves, (1, 8, 64), strict=False):
                rows = {row["context"]: row for row in result["rows"] if row["batch"] == batch}
                rows |= {
                    row["context"]: row
                    for row in result["rows"]
                    if (row["batch"], row["shape"], row["method"]) == (batch, shape, name)
                }
                assert curve.points == [(context, rows[context][key]) for context in some_gpu_result.CONTEXTS]
            bounds = [curve.points for curve in panel.curves if curve.place is None]
            assert len(bounds) == (key == "ratio")


def test_decoding_has_a_panel_for_batch_one_and_one_for_each_context_with_batches(plots):
    ((first, *rest),) = plots.decode_grid(some_gpu_result.decode_result()["rows"])
    assert (first.title, [panel.title for panel in rest]) == ("one sequence", ["4k tokens each", "32k tokens each"])
    assert [x for x, _ in first.curves[0].points] == list(some_gpu_result.CONTEXTS)
    assert [x for x, _ in rest[0].curves[0].points] == [1, 8, 48]
    assert {curve.name for curve in first.curves} == {"occam", "static cache, bfloat16"}


@pytest.mark.parametrize("kind", ["gpu-attend", "gpu-decode"])
def test_a_figure_is_written(plots, kind, tmp_path):
    from occamkv.bench.plots import draw

    draw(some_gpu_result.RESULTS[kind](), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
