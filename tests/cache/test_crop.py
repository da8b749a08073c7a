"""Taking tokens back: exactly within the residual, group by group below it, down to nothing."""

import pytest

from cache_mirror import Mirror, assert_same_contents, contents, left_padded, records_of
from occamkv.methods import method
from some_attention import ASKS_AND_FINDS
from storage_meter import StorageMeter

FORMS = {
    "block": method("oscar"),
    "rolling with pins": method("oscar_roll", pins="first:4"),
    "kivi in groups of 128": method("kivi_g128"),
    "per token": method("rtn"),
    **ASKS_AND_FINDS,
}


def filled(name: str, *, batch: int = 2, prompt: int = 300, decoded: int = 50, seed: int = 0) -> Mirror:
    mirror = Mirror(FORMS[name], batch=batch, seed=seed)
    for count in (prompt, *[1] * decoded):
        mirror.put(*mirror.fresh(count))
        mirror.cache.commit()
    return mirror


@pytest.mark.parametrize("name", FORMS)
def test_a_crop_within_the_residual_is_exact(name):
    mirror, shorter = filled(name, decoded=50), filled(name, decoded=38)
    mirror.remove(12)
    assert mirror.cache.length == 338
    assert mirror.cache.lossy_crops == 0
    for row in range(2):
        assert_same_contents(contents(mirror.cache, row), contents(shorter.cache, row))
    mirror.step(1)


@pytest.mark.parametrize("waiting", [1, 30])
def test_a_crop_of_the_current_step_is_exact(waiting):
    mirror, shorter = filled("block"), filled("block")
    for one in (mirror, shorter):
        one.put(*one.fresh(waiting))
    mirror.cache.remove(waiting)
    shorter.cache.forget_step()
    assert mirror.cache.length == shorter.cache.length == 350
    for row in range(2):
        assert_same_contents(contents(mirror.cache, row), contents(shorter.cache, row))


def test_speculative_tokens_taken_back_leave_no_trace():
    mirror, plain = filled("rolling with pins"), filled("rolling with pins")
    for accepted in (0, 3, 2):
        k, v = mirror.fresh(7)
        mirror.put(k, v)
        mirror.check(7)
        mirror.remove(7 - accepted)
        if accepted:
            plain.put(k[:, :, :accepted], v[:, :, :accepted])
    for one in (mirror, plain):
        one.cache.commit()
    assert mirror.cache.store.rows[0].residual == 127, "one more would have packed the oldest group"
    for row in range(2):
        assert_same_contents(contents(mirror.cache, row), contents(plain.cache, row))
    assert mirror.cache.lossy_crops == 0


@pytest.mark.parametrize("kept", [10, 101, 129, 170, 210])
@pytest.mark.parametrize("name", FORMS)
def test_a_crop_below_the_residual_is_lossy_and_frees_whole_groups(name, kept):
    mirror = filled(name)
    before = [records_of(mirror.cache, row) for row in range(2)]
    counts = [(row.packed, [at for at in row.pins if at < kept]) for row in mirror.cache.store.rows]
    mirror.remove(350 - kept)
    tokens, cut = FORMS[name].packed_format.record_tokens, False
    for row, (packed, pins) in zip(mirror.cache.store.rows, counts, strict=True):
        assert row.tokens == kept and row.pins == pins
        stream = kept - len(pins)
        assert row.packed == min(packed, stream // tokens * tokens), "the cut group is not packed any more"
        assert len(row.pages) == -(-row.packed // 128)
        cut |= row.packed < stream < packed
    assert mirror.cache.lossy_crops == cut
    assert cut or FORMS[name].finds_pins, "pinned tokens may leave as many as fill whole groups"
    for row, old in enumerate(before):
        new = records_of(mirror.cache, row)
        assert_same_contents(new, [x[: len(new[0])] for x in old[: len(new)]])
    mirror.step(1)


def test_a_crop_between_groups_loses_nothing():
    mirror = filled("block")
    mirror.remove(350 - 160)
    assert mirror.cache.lossy_crops == 0
    assert mirror.cache.packed_tokens() == [160, 160]
    mirror.step(1)


def test_bytes_fall_when_slabs_become_free():
    mirror = Mirror(FORMS["block"])
    for _ in range(6):  # one slab each
        mirror.step(128)
    page = FORMS["block"].packed_format.page_bytes(kv_heads=2, head_dim=32)
    assert mirror.cache.nbytes()["packed"] == 6 * page
    mirror.remove(300)
    assert mirror.cache.nbytes()["packed"] == 4 * page
    mirror.remove(4)
    assert mirror.cache.nbytes()["packed"] == 4 * page, "464 tokens still need a part of the fourth page"
    mirror.remove(464)
    assert mirror.cache.nbytes()["packed"] == 0


@pytest.mark.parametrize("name", FORMS)
def test_a_crop_to_nothing_and_a_new_start(name):
    mirror, fresh = filled(name), Mirror(FORMS[name], batch=2)
    mirror.remove(350)
    assert mirror.cache.length == 0
    assert mirror.cache.packed_tokens() == [0, 0]
    assert mirror.cache.lossy_crops == 0
    k, v = mirror.fresh(200)
    for one in (mirror, fresh):
        one.put(k, v)
        one.check(200)
    for row in range(2):
        assert_same_contents(contents(mirror.cache, row), contents(fresh.cache, row))


@pytest.mark.parametrize("kept", [2, 5, 90, 140, 161, 256])
@pytest.mark.parametrize("name", FORMS)
def test_appending_after_a_crop_stays_exact(name, kept):
    mirror = filled(name)
    mirror.remove(350 - kept)
    for count in (1, 40, 1, 150, 1, 1):
        mirror.step(count)
    row = mirror.cache.store.rows[0]
    assert row.residual - row.staged < 128 and row.packed % FORMS[name].packed_format.record_tokens == 0
    assert row.staged < FORMS[name].flush_tokens
    assert row.tokens == kept + 194


@pytest.mark.parametrize("count", [0, 5, 40, 130, 220, 270])
def test_a_crop_of_a_padded_batch_removes_slots(count):
    """Sequences lose as many real tokens as lie in the slots that are removed."""
    mirror = Mirror(FORMS["rolling with pins"], batch=3)
    mirror.step(200, kept=left_padded(200, 0, 60, 199))
    mirror.step(70, kept=left_padded(70, 30, 0, 10))
    mirror.remove(count)
    assert mirror.cache.length == 270 - count
    mirror.cache.commit()
    assert [row.tokens for row in mirror.cache.store.rows] == mirror.real.sum(1).tolist()
    mirror.step(1)
    mirror.step(150)


def test_a_crop_decodes_only_the_group_that_is_cut():
    """A long context is not dequantized to take a few tokens back."""
    peaks = []
    for tokens in (1024, 8192):
        mirror = Mirror(FORMS["block"])
        mirror.put(*mirror.fresh(tokens))
        mirror.cache.commit()
        with StorageMeter() as meter:
            mirror.cache.remove(10)
        assert mirror.cache.lossy_crops == 1
        peaks.append(meter.peak)
    assert peaks[1] <= 1.1 * peaks[0], f"workspace {peaks} bytes"
