"""The figures: a panel for each shape, a line for each contestant, the crossover, and a PNG that shows something."""

import pytest

from occamkv.errors import UnsupportedInput
from some_bench_result import CONTEXTS, attend_result, decode_result, encode_result

plots = pytest.importorskip("occamkv.bench.plots", reason="needs: pip install 'occamkv[plots]'")


def test_attention_has_a_panel_for_each_shape_and_number_of_threads():
    panels = plots.attend_panels(attend_result(methods=("occam", "oscar"), threads=(1, 2))["rows"])
    heads = ("wide (32/8/128)", "narrow (9/3/64)")
    assert [panel.title for panel in panels] == [f"{name}{more}" for name in heads for more in ("", ", 2 threads")]
    for panel in panels:
        assert [line.name for line in panel.lines if line.ours] == ["occamkv occam", "occamkv oscar"]
        assert sum(line.dashed for line in panel.lines) == 3
        assert all([x for x, _ in line.points] == list(CONTEXTS) for line in panel.lines)
    gqa = next(line for line in panels[0].lines if line.name == "SDPA, enable_gqa, bf16")
    assert [y for _, y in gqa.points] == [3.0, 12.0, 48.0]


def test_the_crossover_is_marked_and_told():
    (_, tokens, told), *_ = plots.attend_panels(attend_result()["rows"])[0].crossings
    assert tokens == pytest.approx(8192, rel=0.02)
    assert told == "faster than any stock from about 8k"


def test_decoding_is_drawn_in_tokens_per_second_for_each_dtype():
    result = decode_result()
    (panel,) = plots.decode_panels(result["rows"])
    lines = {line.name: line for line in panel.lines}
    assert set(lines) == {
        "occamkv occam, bfloat16",
        "occamkv occam, float32",
        "DynamicCache with SDPA, bfloat16",
        "DynamicCache with SDPA, float32",
    }
    assert [line.dashed for name, line in sorted(lines.items())] == [False, True] * 2
    first = result["rows"][0]
    assert lines["occamkv occam, bfloat16"].points[0] == (4096, 1000 / first["ours_ms"])
    assert lines["DynamicCache with SDPA, bfloat16"].points[0] == (4096, 1000 / first["stock_ms"])
    assert [told.split(":")[0] for _, _, told in panel.crossings] == ["occam, bfloat16", "occam, float32"]


def ink(path) -> float:
    """Return the share of pixels that are not white."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return float((pixels.min(-1) < 0.98).mean())


@pytest.mark.parametrize(
    "result", [attend_result(methods=("occam", "oscar")), decode_result()], ids=["attend", "decode"]
)
def test_a_figure_is_a_png_with_something_on_it_and_nothing_cut_off(tmp_path, result):
    from matplotlib.image import imread

    plots.draw(result, tmp_path / "a.png")
    assert 0.01 < ink(tmp_path / "a.png") < 0.3
    pixels = imread(tmp_path / "a.png")[..., :3]
    edges = [pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]]
    assert all(bool((edge > 0.98).all()) for edge in edges)


def test_a_single_context_can_be_drawn(tmp_path):
    result = attend_result()
    plots.draw(result | {"rows": result["rows"][:1]}, tmp_path / "a.png")
    assert ink(tmp_path / "a.png") > 0.01


def test_the_same_result_gives_the_same_bytes(tmp_path):
    for name in "ab":
        plots.draw(attend_result(), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("result", "words"),
    [(encode_result(), "no figure of kind 'encode'"), ({}, "schema_version is None")],
    ids=["encode", "{}"],
)
def test_what_has_no_figure_is_refused(tmp_path, result, words):
    with pytest.raises(UnsupportedInput, match=words):
        plots.draw(result, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
