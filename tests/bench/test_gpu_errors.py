"""Errors before times: ragged batches against float64, and what is too large stops the benchmark."""

from dataclasses import replace

import pytest
import torch

from occamkv.bench import Shape, gpu_errors
from occamkv.bench.gpu_errors import LIMIT, SHAPES, check_errors, scene_errors
from occamkv.bench.scene import packed_scene
from occamkv.kernels import backend
from occamkv.methods import method
from some_gpu_rig import cpu_rig


@pytest.fixture
def scene():
    return packed_scene(Shape("8/2/64", 8, 2, 64), method("occam"), backend("reference"), context=700, batch=3)


def test_small_shapes_have_all_head_dims_and_groups():
    shapes = [tuple(map(int, name.split("/"))) for name in SHAPES]
    assert {(head_dim, heads // kv_heads) for heads, kv_heads, head_dim in shapes} == {
        (head_dim, group) for head_dim in (64, 128, 256) for group in (1, 4, 8)
    }


def test_the_reference_is_exact_enough(monkeypatch):
    monkeypatch.setattr(gpu_errors, "SHAPES", SHAPES[:2])
    monkeypatch.setattr(gpu_errors.kernels, "BACKENDS", ("reference",))
    rows = check_errors([method("oscar"), method("occam")], cpu_rig())
    assert [(row["shape"], row["method"]) for row in rows] == [(s, m) for m in ("oscar", "occam") for s in SHAPES[:2]]
    assert all(row["ok"] and row["ours"] < 1e-5 < row["sdpa_bf16"] for row in rows)


def test_sequences_of_different_lengths_are_checked(scene):
    ours, stock = scene_errors(scene, record_tokens=32)
    assert ours < 1e-5 < 1e-3 < stock < 1e-2


@pytest.mark.parametrize("row", [0, 1, 2])
def test_twin_one_wrong_sequence_is_seen(scene, row):
    class Wrong:
        @staticmethod
        def attend(q, **given):
            out = scene.backend.attend(q, **given)
            out[row] *= 1.01
            return out

    ours, _ = scene_errors(replace(scene, backend=Wrong), record_tokens=32)
    assert ours == pytest.approx(0.01, rel=0.01)


def test_twin_lengths_that_are_ignored_are_seen(scene):
    class Full:
        @staticmethod
        def attend(q, **given):
            packed = replace(given["packed"], lengths=scene.packed.lengths)
            return scene.backend.attend(q, **given | {"packed": packed})

    ours, _ = scene_errors(replace(scene, backend=Full), record_tokens=32)
    assert ours > LIMIT


def test_twin_not_a_number_is_an_error(scene):
    class Nothing:
        @staticmethod
        def attend(q, **given):
            return torch.full_like(q, float("nan"))

    ours, _ = scene_errors(replace(scene, backend=Nothing), record_tokens=32)
    assert ours == float("inf")


@pytest.mark.parametrize(("ours", "stock", "ok"), [(1.9e-3, 3e-3, True), (2.1e-3, 3e-3, False), (1e-3, 9e-4, False)])
def test_both_limits_hold(monkeypatch, ours, stock, ok):
    monkeypatch.setattr(gpu_errors, "SHAPES", SHAPES[:1])
    monkeypatch.setattr(gpu_errors, "scene_errors", lambda *_, **__: (ours, stock))
    (row,) = check_errors([method("oscar")], cpu_rig())
    assert row["ok"] is ok
