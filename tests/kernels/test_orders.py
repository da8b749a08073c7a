"""The order of a record's bytes is part of what a backend takes: pages in another one are refused by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import emulated_cuda
from cache_mirror import page_of
from emulated_cuda import native
from occamkv import kernels
from occamkv.cache.pool import PagePool
from occamkv.errors import UnsupportedInput
from occamkv.formats import records
from occamkv.formats.pages import CANONICAL, Pages
from occamkv.kernels import cuda
from occamkv.kernels.cuda.layout import ORDER
from some_attention import METHODS, Case, Held, make_case

CASE = make_case(METHODS["oscar"], held=(Held(1, 3, 5),), queries=1)
PAGES = CASE.packed.slabs[-1]
NATIVE = native(CASE.packed)


def named(order: str) -> Case:
    """The case in native order, whatever its pages say of themselves."""
    return CASE.with_packed(slabs=[replace(slab, order=order) for slab in NATIVE.slabs])


def on_cuda(case: Case) -> Any:
    q = {"q_positions": case.q_positions, "packed": case.packed, "full": case.full}
    with emulated_cuda.on_cpu():
        return cuda.attend(case.q, **q, **case.crossing, packed_splits=2)


READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "records": (CANONICAL, lambda order: records.decode_pages(replace(PAGES, order=order))),
    "cuda reads": (ORDER, lambda order: kernels.backend("cuda").decode(replace(NATIVE.slabs[-1], order=order))),
    "cuda attends": (ORDER, lambda order: on_cuda(named(order))),
    **{
        f"{name} {what}": (CANONICAL, read)
        for name in ("reference", "cpu")
        if kernels.backend(name).refuses(METHODS["oscar"].packed_format, torch.device("cpu")) is None
        for what, read in (
            ("reads", lambda order, name=name: kernels.backend(name).decode(replace(PAGES, order=order))),
            ("attends", lambda order, name=name: named(order).attend(kernels.backend(name))),
            (
                "attends to many queries",
                lambda order, name=name: kernels.backend(name).attend(
                    CASE.q.expand(-1, -1, 9, -1),
                    q_positions=CASE.q_positions.expand(-1, 9),
                    packed=named(order).packed,
                    full=[],
                ),
            ),
        )
    },
}


@pytest.mark.parametrize("what", READERS)
def test_pages_in_another_order_are_refused_by_name(what):
    if what == "cuda attends" and emulated_cuda.missing():
        pytest.skip(emulated_cuda.missing())
    own, read = READERS[what]
    other = {CANONICAL: ORDER, ORDER: CANONICAL}[own]
    read(own)
    with pytest.raises(UnsupportedInput, match=f"order {other!r}; allowed here: {own!r}"):
        read(other)


def test_twin_without_the_name_the_reference_would_read_numbers_that_mean_nothing():
    right, wrong = (case.attend(kernels.backend("reference")) for case in (CASE, named(CANONICAL)))
    assert (right - wrong).abs().max() > 0.1 * right.abs().max()


def test_pages_of_two_orders_are_not_joined():
    with pytest.raises(UnsupportedInput, match="order 'cuda-1'; allowed here: 'canonical'"):
        Pages.concatenate([PAGES, NATIVE.slabs[-1]])


def test_pages_keep_their_order_through_pool_and_choice():
    form = METHODS["oscar"].packed_format
    pool = PagePool(format=form, kv_heads=2, head_dim=64, device=torch.device("cpu"), order=ORDER)
    pool.allocate(2)
    pool.duplicate(pool.allocate(1)[0])
    assert {slab.order for slab in pool.slabs} == {ORDER}
    assert pool.slabs[0].select(torch.tensor([0])).order == Pages.concatenate([pool.slabs[0]] * 2).order == ORDER


def test_each_backend_names_the_order_of_what_it_makes():
    assert {name: kernels.backend(name).order for name in ("reference", "cpu", "cuda")} == {
        "reference": CANONICAL,
        "cpu": CANONICAL,
        "cuda": ORDER,
    }


def test_both_orders_decode_to_the_same_numbers():
    for index in CASE.packed.table[0].tolist():
        slab, page = page_of(CASE.packed.slabs, CASE.packed.starts, index)
        (other, _), at = page_of(NATIVE.slabs, NATIVE.starts, index), torch.tensor([page])
        read = [kernels.backend(n).decode(s.select(at)) for n, s in (("reference", slab), ("cuda", other))]
        assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))
