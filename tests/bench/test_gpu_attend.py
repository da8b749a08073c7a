"""`bench_gpu_attend` on a CPU with a made-up clock: what is compared with what, in which order, what is left out."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from occamkv.bench import Shape, gpu_attend, gpu_timing
from occamkv.bench.gpu_attend import GpuSetting, bench_gpu_attend, bytes_read
from occamkv.bench.gpu_ceilings import Ceilings, measure_ceilings
from occamkv.bench.scene import packed_scene
from occamkv.errors import UnsupportedInput
from occamkv.kernels import backend
from occamkv.methods import method
from some_gpu_rig import cpu_rig

SHAPES = [Shape("4/2/32", 4, 2, 32), Shape("2/2/64", 2, 2, 64)]
CEILINGS = Ceilings(read_gb_per_s=100.0, copy_gb_per_s=90.0)


def setting(**changes):
    given = {"contexts": (300, 200), "batches": (2, 1), "methods": ("oscar", "occam"), "repetitions": 5}
    return GpuSetting(**({"shapes": SHAPES} | given | changes))


def ms_of(call):
    """Each contestant by what it calls: attention of ours, a step of ours, stock with grouped or folded heads."""
    told = str(call)
    return 2.0 if "Scene.attend" in told else 2.5 if "Scene.step" in told else 6.0 if "'folded'" in told else 8.0


@pytest.fixture(scope="module")
def rows():
    found, dropped = bench_gpu_attend(setting(), cpu_rig(ms_of=ms_of), CEILINGS)
    assert dropped == []
    return found


def test_there_is_a_row_for_each_case_and_method_the_most_valuable_first(rows):
    keys = [(row["shape"], row["context"], row["batch"]) for row in rows[::2]]
    assert keys[0] == ("4/2/32", 300, 2)
    assert set(keys[1:4]) == {("4/2/32", 300, 1), ("4/2/32", 200, 2), ("2/2/64", 300, 2)}
    assert keys[-1] == ("2/2/64", 200, 1)
    assert len(set(keys)) == len(keys) == 8
    assert [row["method"] for row in rows] == ["oscar", "occam"] * 8


def test_ratios_are_against_the_fastest_stock(rows):
    for row in rows:
        folds = row["shape"] == "4/2/32"
        assert (row["best_stock"], row["best_stock_ms"]) == (("math_folded", 6.0) if folds else ("math_gqa", 8.0))
        assert row["ours_ms"] == row["contestants"]["ours"]["ms"] == 2.0
        assert row["ratio"] == (3.0 if folds else 4.0)
        assert row["ratio_step"] == (2.4 if folds else 3.2)


def test_speed_and_floor_follow_from_bytes_and_ceilings(rows):
    for row in rows:
        assert row["stock_bytes"] == 4 * row["batch"] * row["context"] * row["kv_heads"] * row["head_dim"]
        assert row["gb_per_s"] == pytest.approx(row["read_bytes"] / 2.0 / 1e6)
        assert row["share_of_read"] == pytest.approx(row["gb_per_s"] / 100)
        assert row["floor_ms"] == pytest.approx(row["read_bytes"] / 1e8)
        assert row["ratio_of_bytes"] == pytest.approx(row["stock_bytes"] / row["read_bytes"])


def test_the_bytes_of_a_call_are_pages_and_tokens_in_full_precision():
    scene = packed_scene(SHAPES[0], method("oscar"), backend("reference"), context=300, batch=2)
    full = 300 - int(scene.packed.lengths[0])
    assert bytes_read(scene) == 2 * (full * 2 * 2 * 32 * 2) + sum(slab.nbytes for slab in scene.packed.slabs)


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_the_ratios_of_bytes_in_the_documents_are_computed_ones():
    text = DOCUMENT.read_text(encoding="utf-8").partition("## On a GPU")[2]
    names = re.findall(r"`(\w+)` \(\d\.\d+", re.search(r"^\| context .*$", text, re.M)[0])
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text, re.M)
    assert len(rows) == len(names) == 3
    for context, cells in rows:
        for name, cell in zip(names, cells.split("|"), strict=True):
            shape = Shape("32/8/128", 32, 8, 128)
            scene = packed_scene(shape, method(name), backend("reference"), context=int(context))
            ratio = gpu_attend.GpuCase(shape, int(context), 1).stock_bytes / bytes_read(scene)
            assert f"{ratio:.2f}x" == cell.strip()


def test_contestants_rotate_over_more_bytes_than_the_cache_holds():
    rig = cpu_rig(l2_bytes=10**6)
    found, _ = bench_gpu_attend(setting(shapes=SHAPES[:1], contexts=(300,), batches=(1,)), rig, CEILINGS)
    stock = -(-3 * 10**6 // found[0]["stock_bytes"])
    ours = [row["copies"] for row in found]
    assert all(row["copies"] * row["read_bytes"] >= 3 * 10**6 for row in found)
    assert set(rig.replayed.rotations) == {stock, *ours}
    assert cpu_rig(l2_bytes=10**6).copies(3 * 10**6) == 1
    assert cpu_rig(l2_bytes=10**6).copies(3 * 10**6 - 1) == 2


def test_each_copy_has_memory_of_its_own():
    case = gpu_attend.GpuCase(SHAPES[0], 300, 1)
    scenes = list(gpu_attend._scenes(case, method("oscar"), cpu_rig()))
    places = {slab.records.data_ptr() for scene in scenes for slab in scene.packed.slabs}
    assert len(places) == len(scenes) > 1
    assert all(torch.equal(scenes[0].attend(scenes[0].q), scene.attend(scene.q)) for scene in scenes)


def test_what_the_budget_does_not_reach_is_left_out_from_the_end_and_named(monkeypatch):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu_timing, "monotonic", lambda: next(seconds))
    wanted = setting(budget_seconds=35)
    found, dropped = bench_gpu_attend(wanted, cpu_rig(), CEILINGS)
    cases = [str(case) for case in wanted.cases()]
    assert [f"{row['shape']}, {row['context']} tokens, batch {row['batch']}" for row in found[::2]] == cases[:3]
    assert dropped == [f"{case}: the budget of 35 s was used up" for case in cases[3:]]


def test_what_does_not_fit_the_memory_is_left_out_and_named():
    rig = cpu_rig(memory_bytes=400_000)
    found, dropped = bench_gpu_attend(setting(shapes=SHAPES[:1], contexts=(300, 2000)), rig, CEILINGS)
    assert {row["context"] for row in found} == {300}
    assert len(dropped) == 2 and all("2000 tokens" in told and "GiB" in told for told in dropped)


def test_a_stock_that_refuses_is_skipped_with_its_reason(monkeypatch):
    real = gpu_attend.makers

    def refuse(q, k, v):
        def call():
            raise RuntimeError("No available kernel.\nmore words")

        return call

    monkeypatch.setattr(gpu_attend, "makers", lambda rig, group: real(rig, group=group) | {"broken": refuse})
    (row, _), _ = bench_gpu_attend(setting(shapes=SHAPES[:1], contexts=(300,), batches=(1,)), cpu_rig(), CEILINGS)
    assert row["skipped"]["broken"] == "No available kernel."
    assert row["skipped"]["flashinfer_bf16"] == "flashinfer is not installed"
    assert set(row["contestants"]) == {"ours", "ours_step", "math_gqa", "math_folded"}


def test_without_any_stock_the_case_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_attend, "makers", lambda rig, group: {})
    found, dropped = bench_gpu_attend(setting(shapes=SHAPES[:1], contexts=(300,), batches=(1,)), cpu_rig(), CEILINGS)
    assert found == [] and "nothing in bfloat16 takes it" in dropped[0]


def test_ceilings_come_from_the_fastest_turn_of_the_fastest_reduction():
    clock, turns = iter([4.0, 2.0, 1.0, 8.0]), Counter()
    by_contestant = {}

    def ms_of(call):
        turns[str(call)] += 1
        best = by_contestant.setdefault(str(call), next(clock, 9.0))
        return best if turns[str(call)] == 3 else 20 * best

    found = measure_ceilings(cpu_rig(memory_bytes=2**22, ms_of=ms_of))
    assert found.copy_gb_per_s == pytest.approx(2 * 2**20 / 4.0 / 1e6)
    assert found.read_gb_per_s == pytest.approx(2**20 / 1.0 / 1e6)


def test_medians_and_extremes_are_of_all_turns_but_the_first():
    told = iter([500.0, 3.0, 1.0, 2.0, 9.0, 4.0])
    times = gpu_timing.take_turns({"one": lambda: next(told)}, 5)["one"]
    assert gpu_timing.spread(times) == {"ms": 3.0, "ms_min": 1.0, "ms_max": 9.0, "repetitions": 5}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"shapes": []}, "shapes", id="no shapes"),
        pytest.param({"methods": ("occam", "occam")}, "methods", id="method twice"),
        pytest.param({"contexts": (2**18,)}, "contexts", id="too long"),
        pytest.param({"contexts": (100,)}, "context 100", id="nothing packed"),
        pytest.param({"batches": (0,)}, "batches", id="no batch"),
        pytest.param({"repetitions": 4}, "repetitions", id="few repetitions"),
        pytest.param({"budget_seconds": 0}, "budget is 0 seconds", id="no budget"),
        pytest.param({"budget_seconds": float("nan")}, "budget is nan seconds", id="a budget that is no number"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, words):
    with pytest.raises(UnsupportedInput, match=words):
        setting(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cpu", "CUDA", "nonsense", ""])
def test_without_a_gpu_there_is_no_rig(name):
    with pytest.raises(UnsupportedInput, match=f"device '{name}' cannot be measured"):
        gpu_timing.gpu_rig(name)


@pytest.mark.parametrize("behind", [0, 9])
def test_the_clock_of_graphs_starts_when_the_launch_is_already_waiting(behind, monkeypatch):
    done: list[str] = []
    events = iter(("start", "end"))

    class Event:
        def __init__(self, enable_timing):
            self.name = next(events)

        def record(self):
            done.append(self.name)

        def elapsed_time(self, end):
            return 3.0 if (self.name, end.name) == ("start", "end") else 0.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"sleep {cycles}"))
    assert gpu_timing._event_ms(lambda: done.append("run"), behind=behind) == 3.0
    assert done == ["wait", *(["sleep 9"] if behind else []), "start", "run", "end", "wait"]


def test_a_gpu_that_does_not_answer_is_refused_with_its_own_words(monkeypatch):
    def busy(device):
        raise RuntimeError("CUDA error: device is busy\nand a page about it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(UnsupportedInput, match="'cuda' cannot be measured: CUDA error: device is busy; allowed"):
        gpu_timing.gpu_rig("cuda")
