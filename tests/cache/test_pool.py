"""The page pool against a dictionary: no page is lost, shared bytes stay, free slabs go back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_mirror import page_of
from occamkv.cache.pool import PagePool
from occamkv.formats import Format
from occamkv.formats.records import Records

FORMAT = Format(token_scale=True, metadata_bits=8)
PAGE_BYTES = FORMAT.page_bytes(kv_heads=2, head_dim=32)


def new_pool() -> PagePool:
    return PagePool(format=FORMAT, kv_heads=2, head_dim=32, device=torch.device("cpu"))


def some_records(count: int, generator: torch.Generator) -> Records:
    size = FORMAT.sections(32).record_bytes
    return Records(
        torch.randint(0, 256, (count, 2, size), dtype=torch.uint8, generator=generator),
        torch.rand(count, 32, generator=generator),
        torch.rand(count, 2, 2, generator=generator).half(),
    )


def read(pool: PagePool, number: int, slot: int) -> list[torch.Tensor]:
    slab, page = page_of(pool.slabs, pool.starts, number)
    tokens = slice(slot * 32, (slot + 1) * 32)
    return [slab.records[page, :, slot], slab.norms[page, tokens], slab.super_scales[page, :, slot]]


def test_a_slab_holds_exactly_the_pages_that_were_asked_for():
    pool = new_pool()
    assert pool.nbytes == 0
    first, second = pool.allocate(3), pool.allocate(1)
    assert [slab.count for slab in pool.slabs] == [3, 1]
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.nbytes == 4 * PAGE_BYTES
    assert pool.allocate(0) == [] and len(pool.slabs) == 2


def test_fresh_pages_are_zero():
    pool = new_pool()
    pool.allocate(2)
    assert all(not tensor.view(torch.uint8).any() for tensor in pool.slabs[0].tensors)


def test_free_pages_are_used_before_a_new_slab_is_made():
    pool = new_pool()
    numbers = pool.allocate(4)
    pool.release(numbers[1:3])
    assert pool.nbytes == 4 * PAGE_BYTES, "a slab that is partly used stays"
    again = pool.allocate(3)
    assert set(numbers[1:3]) < set(again) and not set(again) & {numbers[0], numbers[3]}
    assert pool.nbytes == 5 * PAGE_BYTES


def test_a_slab_without_used_pages_is_given_back():
    pool = new_pool()
    first, second, third = pool.allocate(2), pool.allocate(3), pool.allocate(1)
    pool.release(second)
    assert pool.nbytes == 3 * PAGE_BYTES
    fresh = pool.allocate(2)
    assert not set(fresh) & {*first, *third}
    pool.release(first + third + fresh)
    assert pool.nbytes == 0 and pool.slabs == []


def test_a_shared_page_lives_until_its_last_owner_goes():
    pool = new_pool()
    number = pool.allocate(1)[0]
    assert not pool.shared(number)
    pool.share([number])
    assert pool.shared(number)
    pool.release([number])
    assert not pool.shared(number) and pool.nbytes == PAGE_BYTES
    pool.release([number])
    assert pool.nbytes == 0


actions = st.one_of(
    st.tuples(st.just("allocate"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["release", "share", "duplicate", "write"]), st.integers(0, 99)),
)


@given(st.lists(actions, max_size=40), st.integers(0, 999))
@settings(deadline=None, max_examples=80)
def test_any_course_of_events(course, seed):
    pool, generator = new_pool(), torch.Generator().manual_seed(seed)
    owners: dict[int, int] = {}
    written: dict[tuple[int, int], list[torch.Tensor]] = {}
    for action, what in course:
        if action == "allocate":
            fresh = pool.allocate(what)
            assert not set(fresh) & owners.keys(), "a page in use is never handed out"
            owners |= dict.fromkeys(fresh, 1)
            continue
        if not owners:
            continue
        numbers = sorted(owners)
        number = numbers[what % len(numbers)]
        if action == "release":
            pool.release([number])
            drop(number, owners, written)
        elif action == "share":
            pool.share([number])
            owners[number] += 1
        elif action == "duplicate" and pool.shared(number):
            twin = pool.duplicate(number)
            assert twin not in owners
            owners[twin] = 1
            written |= {(twin, slot): old for (page, slot), old in written.items() if page == number}
            drop(number, owners, written)
        elif action == "write":
            chosen = [numbers[(what + i) % len(numbers)] for i in range(min(3, len(numbers)))]
            records = some_records(len(chosen), generator)
            slots = [(what + i) % 4 for i in range(len(chosen))]
            pool.write(records, pages=chosen, slots=slots)
            for i, place in enumerate(zip(chosen, slots, strict=True)):
                written[place] = [t[i] for t in records]
        for (page, slot), expected in written.items():
            for new, old in zip(read(pool, page, slot), expected, strict=True):
                assert torch.equal(new.flatten(), old.flatten())
        in_slabs = {start + i for start, slab in zip(pool.starts, pool.slabs, strict=True) for i in range(slab.count)}
        assert owners.keys() <= in_slabs
        assert all(
            any(start + i in owners for i in range(s.count)) for start, s in zip(pool.starts, pool.slabs, strict=True)
        )
        assert pool.nbytes == len(in_slabs) * PAGE_BYTES


def drop(number: int, owners: dict[int, int], written: dict) -> None:
    owners[number] -= 1
    if not owners[number]:
        del owners[number]
        for place in [place for place in written if place[0] == number]:
            del written[place]
