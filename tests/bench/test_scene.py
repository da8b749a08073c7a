"""The cache that a benchmark reads is the one that a real layer would hold, and every page is memory of its own."""

import pytest
import torch

from occamkv.bench.inputs import Shape
from occamkv.bench.scene import DTYPE, packed_scene, random_tokens, statistics_of
from occamkv.bench.stock import causal, exact, folded, gqa, manual, relative_error
from occamkv.cache import LayerCache
from occamkv.kernels import backend
from occamkv.methods import method

SHAPE = Shape("small", 6, 2, 32)
METHODS = ("occam", "oscar", "turboquant", "kvarn", "rotatekv", "occam_quality", "ott", "kivi_k3v4")


def scene_of(name: str = "occam", context: int = 700, queries: int = 1):
    return packed_scene(SHAPE, method(name), backend("reference"), context=context, queries=queries)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("name", METHODS)
def test_attention_on_the_pages_is_attention_on_the_dequantized_tokens(name, queries):
    scene = scene_of(name, queries=queries)
    k, v = scene.dequantized()
    assert k.shape == v.shape == (1, 2, 700, 32)
    assert relative_error(scene.attend(scene.q.float()), exact(scene.q, k, v)) < 1e-5


def test_a_token_that_is_changed_changes_the_attention():
    scene = scene_of()
    k, v = scene.dequantized()
    v[0, 0, 350] += 1
    assert relative_error(scene.attend(scene.q.float()), exact(scene.q, k, v)) > 1e-5


@pytest.mark.parametrize("context", [400, 512, 700])
@pytest.mark.parametrize("name", METHODS)
def test_it_holds_as_many_tokens_of_each_kind_as_a_real_layer(name, context):
    chosen, scene = method(name), scene_of(name, context)
    drawn = random_tokens(SHAPE, context, 1)
    layer = LayerCache(chosen, statistics=statistics_of(chosen, SHAPE))
    layer.update(drawn.k[:, :, :-1].to(DTYPE), drawn.v[:, :, :-1].to(DTYPE))
    layer.commit()
    packed = layer.store.packed_tokens()
    counts = [int((part.positions >= 0).sum()) for part in scene.full]
    assert sum(counts) + int(scene.packed.lengths) == context
    assert counts[-1] == 1
    if chosen.pinning.judges:  # how many pins a real layer finds depends on its tokens
        return
    assert scene.packed.lengths.tolist() == packed.lengths.tolist()
    real = [(part.k.shape, part.k.dtype) for part in layer.store.full_tokens()]
    assert [(part.k.shape, part.k.dtype) for part in scene.full[:-1]] == real
    assert scene.packed_bytes == layer.nbytes()["packed"]


def test_every_page_has_memory_of_its_own_with_repeated_bytes():
    scene = scene_of("oscar", context=128 * 9)
    slab = scene.packed.slabs[0]
    assert slab.records.is_contiguous()
    assert scene.packed.table.unique().numel() == slab.count == 8
    assert torch.equal(slab.records[0], slab.records[6])
    assert torch.equal(slab.records[1], slab.records[7])
    assert not torch.equal(slab.records[0], slab.records[1])
    before = scene.attend(scene.q)
    slab.records[6] = 0
    assert not torch.equal(scene.attend(scene.q), before)
    assert slab.records[0].any()


def test_there_are_outlier_channels_and_a_sink():
    drawn = random_tokens(Shape("s", 4, 2, 64), 512, 1)
    spread = drawn.k.std(dim=(0, 1, 2)).sort(descending=True).values
    assert spread[1] > 3 * spread[2]
    logits = (drawn.q.unflatten(1, (2, 2)) @ drawn.k[:, :, None].transpose(-1, -2)).flatten()
    share = logits.reshape(4, 512).mul(64**-0.5).softmax(-1)[:, 0].mean()
    assert share > 5 / 512


@pytest.mark.parametrize("queries", [1, 3])
def test_all_formulations_of_torch_compute_the_same(queries):
    drawn = random_tokens(SHAPE, 65, queries)
    seen, truth = causal(queries, 65), exact(drawn.q, drawn.k, drawn.v)
    for function in (gqa, folded, manual):
        assert relative_error(function(drawn.q, drawn.k, drawn.v, seen), truth) < 1e-5
    if queries > 1:
        assert relative_error(gqa(drawn.q, drawn.k, drawn.v, None), truth) > 1e-3


def test_sequences_of_a_batch_hold_the_same_tokens_in_memory_of_their_own():
    one = scene_of("occam", context=700)
    several = packed_scene(SHAPE, method("occam"), backend("reference"), context=700, batch=3)
    out = several.attend(several.q)
    assert all(torch.equal(out[row : row + 1], one.attend(one.q)) for row in range(3))
    assert several.packed.table.unique().numel() == several.packed.table.numel()
    several.packed.slabs[0].records[several.packed.table[1]] = 0
    changed = several.attend(several.q)
    assert [torch.equal(changed[row], out[row]) for row in range(3)] == [True, False, True]


def test_room_for_steps_belongs_to_the_tables_of_steps_alone(monkeypatch):
    described = []
    monkeypatch.setattr(backend("reference"), "stepper", described.append)
    given = {"context": 700, "batch": 2}
    plain = packed_scene(SHAPE, method("occam"), backend("reference"), **given)
    roomy = packed_scene(SHAPE, method("occam"), backend("reference"), **given, room=2)
    assert roomy.packed_bytes == plain.packed_bytes
    assert len(roomy.packed.slabs) == 1 and roomy.packed.table.shape == plain.packed.table.shape
    assert [len(b) - len(a) for a, b in zip(described[0].tables, described[1].tables, strict=True)] == [2, 2]
    numbers = [number for table in described[1].tables for number in table]
    assert len(set(numbers)) == len(numbers)
