"""What only the reference has: blocks of pages, rows and queries joined by an online softmax."""

import pytest
import torch

from occamkv import kernels
from occamkv.kernels import blockwise, reference
from some_attention import METHODS, RAGGED, Held, make_case


@pytest.mark.parametrize("logits", [1, 3 * 128 * 10, 2**20])
@pytest.mark.parametrize("pages_at_once", [1, 2, 3, 100])
@pytest.mark.parametrize("option", [{}, {"window": 50}, {"sinks": torch.tensor([0.5, -1.0])}], ids=str)
def test_the_cut_into_blocks_does_not_show(monkeypatch, pages_at_once, logits, option):
    case = make_case(METHODS["oscar"], queries=7, held=(*RAGGED, Held(0, 11, 0), Held(4, 1, 0, pads=7)))
    page_bytes = 2 * 4 * 2 * 128 * 64
    monkeypatch.setattr(blockwise, "_KV_WORKSPACE_BYTES", pages_at_once * page_bytes)
    monkeypatch.setattr(blockwise, "_LOGITS", logits)
    case.check(reference, **option)


def test_large_logits_neither_overflow_nor_vanish():
    case = make_case(METHODS["oscar"], queries=2)
    case.check(reference, scale=3.0)
    out = case.attend(reference, scale=1e4)
    assert out.isfinite().all() and (out.abs().amax(-1) > 0).all()


def test_the_reference_refuses_nothing():
    for form in METHODS.values():
        assert reference.refuses(form.packed_format, torch.device("cpu")) is None
        assert kernels.backend_for(form.packed_format, "cpu").name in kernels.BACKENDS
