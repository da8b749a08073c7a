"""Input that cannot be held: the right error, a message that names what was given, and a cache that did not change."""

import copy

import pytest
import torch

from cache_mirror import Mirror, assert_same, leaves, left_padded
from occamkv.cache import masks, waiting
from occamkv.errors import CacheMismatch, UnsupportedFormat, UnsupportedInput
from occamkv.methods import method


def filled(form=None, *, dtype=torch.float32, waiting: int = 0) -> Mirror:
    mirror = Mirror(form or method("oscar_roll", pins="first:4"), batch=2, heads=2, head_dim=64, dtype=dtype)
    mirror.step(300, kept=left_padded(300, 0, 50))
    mirror.step(1)
    if waiting:
        mirror.cache.note(mirror.put(*mirror.fresh(waiting)))
    return mirror


def poisoned(value: float, *shape: int) -> torch.Tensor:
    k = torch.zeros(*shape)
    k[1, 0, 3, 5] = value
    return k


ZEROS = torch.zeros(2, 2, 4, 64)
BAD_UPDATES = {
    "another batch size": (CacheMismatch, "batch size of this call is 3, the cache holds 2", torch.zeros(3, 2, 4, 64)),
    "other heads": (CacheMismatch, "KV heads of this call is 1, the cache holds 2", torch.zeros(2, 1, 4, 64)),
    "another head_dim": (CacheMismatch, "head_dim of this call is 32, the cache holds 64", torch.zeros(2, 2, 4, 32)),
    "another dtype": (CacheMismatch, r"torch.bfloat16, the cache holds torch.float32", ZEROS.bfloat16()),
    "NaN": (UnsupportedInput, r"K holds 1 NaN.*\[1, 0, 3, 5\]", poisoned(float("nan"), 2, 2, 4, 64)),
    "infinity": (UnsupportedInput, r"K holds 1 NaN or infinite.*\[1, 0, 3, 5\]", poisoned(float("inf"), 2, 2, 4, 64)),
    "integers": (UnsupportedInput, "torch.int64", ZEROS.long()),
    "three dimensions": (UnsupportedInput, r"\(2, 4, 64\)", torch.zeros(2, 4, 64)),
    "an odd head_dim": (UnsupportedFormat, "head_dim is 12", torch.zeros(2, 2, 4, 12)),
    "a head_dim of 264": (UnsupportedFormat, "head_dim is 264", torch.zeros(2, 2, 4, 264)),
    "an empty batch": (UnsupportedInput, r"\(0, 2, 4, 64\).*at least one sequence", torch.zeros(0, 2, 4, 64)),
    "no heads": (UnsupportedInput, r"\(2, 0, 4, 64\)", torch.zeros(2, 0, 4, 64)),
}


@pytest.mark.parametrize("waiting", [0, 5])
@pytest.mark.parametrize("what", BAD_UPDATES)
def test_a_bad_update_changes_nothing(what, waiting):
    error, told, k = BAD_UPDATES[what]
    mirror = filled(waiting=waiting)
    before = copy.deepcopy(leaves(mirror.cache))
    with pytest.raises(error, match=told):
        mirror.cache.update(k, torch.zeros_like(k))
    assert_same(leaves(mirror.cache), before)
    mirror.step(1)


def test_bad_v_is_found_too():
    mirror = filled()
    before = copy.deepcopy(leaves(mirror.cache))
    with pytest.raises(UnsupportedInput, match="V holds 1 NaN"):
        mirror.cache.update(ZEROS, poisoned(float("nan"), 2, 2, 4, 64))
    with pytest.raises(UnsupportedInput, match=r"K \(2, 2, 4, 64\).* V \(2, 2, 5, 64\)"):
        mirror.cache.update(ZEROS, torch.zeros(2, 2, 5, 64))
    assert_same(leaves(mirror.cache), before)


def test_no_new_tokens_are_no_change():
    mirror = filled(waiting=5)
    before = copy.deepcopy(leaves(mirror.cache))
    mirror.cache.update(ZEROS[:, :, :0], ZEROS[:, :, :0])
    assert_same(leaves(mirror.cache), before)
    empty = Mirror(method("oscar")).cache
    empty.update(ZEROS[:, :, :0], ZEROS[:, :, :0])
    assert empty.length == 0


LARGE = {
    "kivi-K": ("kivi_roll", "k"),
    "kivi-V": ("kivi_roll", "v"),
    "oscar-V": ("oscar_roll", "v"),
    "rtn-K": ("rtn", "k"),
}


def large(mirror: Mirror, which: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = mirror.fresh(count)
    (k if LARGE[which][1] == "k" else v)[1, 0, 0, 3] = 1e6
    return k, v


@pytest.mark.parametrize("count", [1, 9, 128, 300])
@pytest.mark.parametrize("which", LARGE)
def test_a_step_that_overflows_float16_is_refused_at_once(which, count):
    mirror = Mirror(method(LARGE[which][0]), batch=2, heads=2, head_dim=64)
    mirror.step(127)
    mirror.cache.commit()
    before = copy.deepcopy(leaves(mirror.cache))
    k, v = large(mirror, which, count)
    with pytest.raises(UnsupportedInput, match=r"does not fit.*\|[KV]\| (1e\+06|1\.25e\+05).*49128"):
        mirror.cache.update(k, v)
    assert_same(leaves(mirror.cache), before)
    mirror.step(1)


def test_a_first_step_that_is_dropped_leaves_an_empty_cache(monkeypatch):
    monkeypatch.setattr(waiting, "check_storable", lambda k, v, format: None)
    mirror = Mirror(method("kivi"), batch=2)
    mirror.cache.update(*(x.repeat(1, 1, 150, 1) for x in large(mirror, "kivi-K", 1)))
    with pytest.raises(UnsupportedInput, match="does not fit"):
        mirror.cache.attend(torch.zeros(2, 2, 150, 32))
    assert (mirror.cache.length, mirror.cache.batch) == (0, 0)
    three = Mirror(method("kivi"), batch=3)
    three.cache = mirror.cache
    three.step(150)


@pytest.mark.parametrize("which", LARGE)
def test_without_the_check_a_token_that_overflows_is_still_refused_when_its_group_is_due(which, monkeypatch):
    """The second line of defence. A crop that takes the token away makes the cache usable again."""
    monkeypatch.setattr(waiting, "check_storable", lambda k, v, format: None)
    mirror = Mirror(method(LARGE[which][0]), batch=2, heads=2, head_dim=64)
    mirror.step(200)
    mirror.put(*large(mirror, which, 1))
    mirror.cache.settle()
    for _ in range(2):
        for _ in range(200):
            mirror.cache.commit()
            before = copy.deepcopy(leaves(mirror.cache))
            mirror.cache.update(*mirror.fresh(1))
            try:
                mirror.cache.settle()
            except UnsupportedInput:
                break
        else:
            pytest.fail("the token was never packed")
        assert_same(leaves(mirror.cache), before)
    mirror.cache.remove(mirror.cache.length - 200)
    mirror.k, mirror.v, mirror.real = (
        [k[:, :200] for k in mirror.k],
        [v[:, :200] for v in mirror.v],
        mirror.real[:, :200],
    )
    for count in (1, 200, 1):
        mirror.step(count)


def test_k_that_overflows_float16_fits_when_norms_are_float32():
    mirror = Mirror(method("oscar"), batch=2)
    k, v = mirror.fresh(200)
    mirror.put(k * 1e6, v)
    mirror.check(200, scale=1e-6)
    assert mirror.cache.packed_tokens() == [128, 128]
    mirror.step(1, scale=1e-6)


@pytest.mark.parametrize("rows", [[], [2], [0, 5], [-3]], ids=str)
def test_rows_that_do_not_exist(rows):
    mirror = filled(waiting=3)
    before = copy.deepcopy(leaves(mirror.cache))
    with pytest.raises(UnsupportedInput, match=rf"rows are \{rows}".replace("]", r"\]") + ".*batch size 2"):
        mirror.cache.select(rows)
    assert_same(leaves(mirror.cache), before)


@pytest.mark.parametrize("count", [-1, 305, 10**9])
def test_removing_a_number_that_is_not_held(count):
    mirror = filled(waiting=3)
    before = copy.deepcopy(leaves(mirror.cache))
    with pytest.raises(UnsupportedInput, match=f"cannot remove {count} tokens; allowed: 0 to the 304 held"):
        mirror.cache.remove(count)
    assert_same(leaves(mirror.cache), before)


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        pytest.param(
            left_padded(4, 0, 0).flip(1) & torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool(), "sequence 0", id="last"
        ),
        pytest.param(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool(), "sequence 1", id="several"),
        pytest.param(torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool(), "sequence 1", id="a whole step"),
    ],
)
def test_right_padding_is_refused(kept, told):
    mirror = filled()
    before = copy.deepcopy(leaves(mirror.cache))
    with pytest.raises(UnsupportedInput, match=f"{told}.*ends in padding.*padding_side"):
        mirror.put(*mirror.fresh(4), kept)
    mirror.cache.forget_step()
    assert_same(leaves(mirror.cache), before)


def test_a_pad_that_becomes_visible_is_refused():
    mirror = filled()
    before = copy.deepcopy(leaves(mirror.cache))
    mirror.cache.update(*mirror.fresh(1))
    mask = torch.ones(2, 1, 1, 302, dtype=torch.bool)
    with pytest.raises(UnsupportedInput, match="dropped as padding"):
        masks.read_mask(mask, before=mirror.cache.slots_before(1), new=1, batch=2)
    mirror.cache.forget_step()
    assert_same(leaves(mirror.cache), before)


def test_twin_a_change_would_be_noticed():
    mirror = filled()
    before = copy.deepcopy(leaves(mirror.cache))
    assert_same(leaves(mirror.cache), before)
    mirror.cache.store.pool.slabs[0].records[0, 0, 0, 0] ^= 1
    with pytest.raises(AssertionError, match="records differs"):
        assert_same(leaves(mirror.cache), before)
