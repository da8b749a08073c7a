"""Choosing, repeating and reordering sequences: pages are shared, and copied before one of the owners writes."""

import copy

import pytest
import torch

from cache_mirror import Mirror, assert_same, assert_same_contents, contents, leaves, left_padded, records_of
from occamkv.methods import method
from some_attention import ASKS_AND_FINDS

FORMS = {"block": method("oscar"), "rolling with pins": method("kivi_k3v4_m8_roll", pins="first:4")} | ASKS_AND_FINDS


def filled(name: str, tokens: int = 330) -> Mirror:
    mirror = Mirror(FORMS[name], batch=3, outliers=0.04)
    mirror.step(tokens, kept=left_padded(tokens, 0, 40, 100))
    return mirror


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1], [0, 0, 2, 2, 2], [2, 1, 1]], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_a_choice_moves_bits_and_answers(name, rows):
    mirror = filled(name)
    before = [contents(mirror.cache, row) for row in range(3)]
    mirror.select(rows)
    assert mirror.cache.batch == len(rows)
    for new, old in enumerate(rows):
        assert_same_contents(contents(mirror.cache, new), before[old])
    for count in (1, 1, 60, 130, 1):
        mirror.step(count)


@pytest.mark.parametrize("name", FORMS)
def test_copies_of_a_sequence_share_pages_until_they_part(name):
    """Every copy goes its own way, and equals a sequence that was never shared."""
    mirror = filled(name)
    packed = mirror.cache.nbytes()["packed"]
    mirror.select([0, 0, 0, 1])
    assert mirror.cache.nbytes()["packed"] <= packed, "nothing is copied by choosing"
    alone = [filled(name) for _ in range(4)]
    for one, row in zip(alone, (0, 0, 0, 1), strict=True):
        one.select([row])
    for count in (70, 1, 64, 1, 1, 130):
        k, v = mirror.fresh(count)
        for row, one in enumerate(alone):
            one.put(k[row : row + 1], v[row : row + 1])
            one.check(count)
        mirror.put(k, v)
        mirror.check(count)
    for row, one in enumerate(alone):
        one.cache.commit()
        mirror.cache.commit()
        assert_same_contents(contents(mirror.cache, row), contents(one.cache, 0))


def test_writing_to_one_copy_leaves_the_bytes_of_the_other():
    """The page that both still fill is copied for the one that writes."""
    mirror = Mirror(FORMS["rolling with pins"])
    mirror.step(4 + 160)
    mirror.select([0, 0])
    before, store = records_of(mirror.cache, 1), mirror.cache.store
    assert store.rows[0].packed % 128, "the last page is not full"
    assert store.rows[0].pages == store.rows[1].pages
    mirror.step(100, kept=left_padded(100, 0, 99))
    mirror.cache.commit()
    assert store.rows[0].packed > store.rows[1].packed
    assert store.rows[0].pages[0] != store.rows[1].pages[0]
    assert_same_contents(records_of(mirror.cache, 1), before)


def test_full_pages_stay_shared():
    mirror = Mirror(FORMS["block"])
    mirror.step(256)
    mirror.select([0, 0, 0])
    one = mirror.cache.nbytes()["packed"]
    for _ in range(128):
        mirror.step(1)
    pages = [row.pages for row in mirror.cache.store.rows]
    assert pages[0][:2] == pages[1][:2] == pages[2][:2]
    assert len({row[2] for row in pages}) == 3
    assert mirror.cache.nbytes()["packed"] == one + 3 * one // 2


def test_pages_that_no_sequence_uses_are_given_back():
    mirror = filled("block")
    mirror.select([1])
    mirror.step(1)
    mirror.select([0, 0])
    mirror.remove(mirror.cache.length)
    assert mirror.cache.nbytes()["packed"] == 0


@pytest.mark.parametrize("name", FORMS)
def test_a_crop_of_shared_pages(name):
    mirror = filled(name)
    mirror.select([0, 0, 2])
    mirror.remove(215)
    for count in (30, 1, 140, 1):
        mirror.step(count)


def test_a_choice_in_the_middle_of_a_step_moves_the_waiting_tokens():
    mirror = filled("block")
    seen = mirror.put(*mirror.fresh(12))
    mirror.cache.note(seen)
    mirror.select([2, 0])
    mirror.step(1)


def test_rows_counted_from_the_end():
    mirror, same = filled("block"), filled("block")
    mirror.select([-1, -3])
    same.select([2, 0])
    assert_same(leaves(mirror.cache), leaves(same.cache))


def test_an_empty_cache_has_nothing_to_choose_from():
    mirror = Mirror(FORMS["block"])
    mirror.cache.select([0, 0])
    assert mirror.cache.batch == 0


def test_a_deep_copy_lives_on_its_own():
    mirror = filled("rolling with pins")
    mirror.put(*mirror.fresh(3))
    twin = copy.deepcopy(mirror)
    before = leaves(twin.cache)
    assert_same(leaves(mirror.cache), before)
    shared = {x.data_ptr() for x in leaves(mirror.cache).values() if isinstance(x, torch.Tensor) and x.numel()}
    assert not shared & {x.data_ptr() for x in before.values() if isinstance(x, torch.Tensor)}
    copies = {path: x.clone() if isinstance(x, torch.Tensor) else x for path, x in before.items()}
    mirror.step(200)
    mirror.select([2, 2])
    assert_same(leaves(twin.cache), copies)
    twin.step(1)


def test_reset_forgets_everything():
    mirror = filled("block")
    mirror.cache.reset()
    assert (mirror.cache.length, mirror.cache.batch, mirror.cache.packed_tokens()) == (0, 0, [])
    assert sum(mirror.cache.nbytes().values()) == 0
    fresh = Mirror(FORMS["block"], batch=5, dtype=torch.bfloat16)
    fresh.cache = mirror.cache
    fresh.step(200)
