"""The contract can fail: wrong bytes, norms, lengths and places are noticed, and all stored bits but padding matter."""

from dataclasses import replace

import pytest
import torch

import slow_decoder
from occamkv import kernels
from occamkv.formats import padded
from scattered_pages import clone_slabs, page_at
from some_attention import METHODS, Case, Held, attend_backends, backend_or_skip, make_case

REFERENCE = kernels.backend("reference")
WIDE_CODES = "oscar-k4v3-balanced-with-float16-norms"
HELD = (Held(2, 5, 20), Held(1, 3, 127))


def swap(tensor: torch.Tensor, start: int, size: int) -> None:
    """Exchange two neighbouring runs of `size` bytes."""
    first = tensor[..., start : start + size].clone()
    tensor[..., start : start + size] = tensor[..., start + size : start + 2 * size]
    tensor[..., start + size : start + 2 * size] = first


def in_every_slab(case: Case, change) -> Case:
    slabs = clone_slabs(case.packed)
    for slab in slabs:
        change(slab, slab.format.sections(slab.head_dim))
    return case.with_packed(slabs=slabs)


def off_by(case: Case, field: str, amount: int) -> Case:
    return case.with_packed(**{field: getattr(case.packed, field) + amount})


def garbage_shown(case: Case) -> Case:
    shown = [replace(part, positions=part.positions.clamp_min(0)) for part in case.full]
    return replace(case, full=shown)


TAMPERED = {
    "bit planes of K swapped": lambda c: in_every_slab(c, lambda p, s: swap(p.records, 0, s.k_codes // 2)),
    "K scale and minimum swapped": lambda c: in_every_slab(c, lambda p, s: swap(p.records, s.k_codes, s.k_scale)),
    "V scale and minimum swapped": lambda c: in_every_slab(
        c, lambda p, s: swap(p.records, s.record_bytes - 2 * s.v_scale, s.v_scale)
    ),
    "heads exchanged": lambda c: in_every_slab(c, lambda p, s: p.records.copy_(p.records.flip(1))),
    "norms one token late": lambda c: in_every_slab(c, lambda p, s: p.norms.copy_(p.norms.roll(1, 1))),
    "norms left out": lambda c: in_every_slab(c, lambda p, s: p.norms.fill_(1)),
    "length one record too long": lambda c: off_by(c, "lengths", c.packed.format.record_tokens),
    "length one record too short": lambda c: off_by(c, "lengths", -c.packed.format.record_tokens),
    "sequences exchanged": lambda c: c.with_packed(table=c.packed.table.flip(0)),
    "pages of a sequence exchanged": lambda c: c.with_packed(table=c.packed.table.flip(1)),
    "empty slots read": garbage_shown,
    "balance left out": lambda c: replace(c, crossing=c.crossing | {"balance": None}),
    "query not rotated": lambda c: replace(c, crossing=c.crossing | {"hadamard_block": None}),
    "output not rotated back": lambda c: replace(c, crossing=c.crossing | {"rotate_output": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("what", TAMPERED)
def test_twin_a_wrong_input_breaks_the_check(what, dtype):
    case = make_case(METHODS[WIDE_CODES], held=HELD, dtype=dtype)
    case.check(REFERENCE)
    with pytest.raises(AssertionError, match="error"):
        TAMPERED[what](case).check(REFERENCE)


@pytest.mark.parametrize("amount", [1, -1])
def test_twin_a_first_position_that_is_off_by_one_breaks_the_check(amount):
    case = make_case(METHODS["oscar"], held=HELD)
    case.check(REFERENCE, window=150)
    with pytest.raises(AssertionError, match="error"):
        off_by(case, "first_position", amount).check(REFERENCE, window=150)


def test_twin_swapped_super_scales_break_the_check():
    case = make_case(METHODS["kivi-k3v4-with-8-bit-metadata"], held=HELD)
    case.check(REFERENCE)
    with pytest.raises(AssertionError, match="error"):
        in_every_slab(case, lambda p, s: p.super_scales.copy_(p.super_scales.flip(-1))).check(REFERENCE)


def test_twin_memory_left_unwritten_breaks_the_check():
    class Lazy:
        @staticmethod
        def attend(q, **given):
            out = torch.empty_like(q)
            out[:, :, 1:] = REFERENCE.attend(q, **given)[:, :, 1:]
            return out

    with pytest.raises(AssertionError, match="not finite"):
        make_case(METHODS["oscar"]).check(Lazy)


def flip(case: Case, *, byte: int, bit: int, tensor: str = "records") -> Case:
    """One bit of the second record of head 1 in the first sequence's first page, or of what belongs to it."""
    slabs = clone_slabs(case.packed)
    slab, page = page_at(case.packed, 0, 0)
    target = getattr(slabs[slab], tensor)[page]
    raw = (target[1, 1] if tensor != "norms" else target[slabs[slab].format.record_tokens :]).view(torch.uint8)
    raw[byte] ^= 1 << bit
    return case.with_packed(slabs=slabs)


def even_case(name: str, head_dim: int) -> Case:
    """One query that looks at everything about evenly, so that every token counts."""
    case = make_case(METHODS[name], head_dim=head_dim, held=(Held(0, 8, 3),), queries=1)
    return replace(case, q=case.q * 0.3)


@attend_backends
@pytest.mark.parametrize("name", METHODS)
def test_every_section_of_a_record_is_read(backend, name):
    case, target = even_case(name, 64), backend_or_skip(backend, METHODS[name])
    format, before = case.packed.format, case.attend(target)
    wide = format.metadata_bits == 16
    start = 0
    for index, size in enumerate(format.sections(64).sizes):
        codes = index in (0, 3)
        for byte in (0, size // 2 + 1, size - 1) if size else ():
            # any bit of a code; of a scale or minimum the highest of the mantissa (its byte is the odd one of two)
            place = {"byte": start + (byte | 1 if wide else byte), "bit": 1 if wide else 2}
            chosen = {"byte": start + byte, "bit": (3 * byte) % 8} if codes else place
            assert not torch.equal(flip(case, **chosen).attend(target), before), (index, chosen)
        start += size
    if format.token_scale:
        high = format.norm_bytes - (2 if format.norm_bytes == 4 else 1)
        changed = flip(case, byte=high, bit=0, tensor="norms")
        assert not torch.equal(changed.attend(target), before)
    if not wide:
        for byte in (1, 3):
            assert not torch.equal(flip(case, byte=byte, bit=3, tensor="super_scales").attend(target), before)


@attend_backends
@pytest.mark.parametrize("name", METHODS)
def test_codes_of_padding_channels_are_not_read(backend, name):
    case, target = even_case(name, 80), backend_or_skip(backend, METHODS[name])
    before, format = case.attend(target), case.packed.format
    *others, (_, last) = slow_decoder.sides(format, 80)[0].runs
    last = range(padded(80))[last]  # with 2.5 bits the second half, behind the first
    start = sum(bits * format.record_tokens * len(range(padded(80))[channels]) for bits, channels in others)
    first_plane_bits = 2
    for token in (0, 7, 31):
        for channel, moves in ((79, True), (80, False), (padded(80) - 1, False)):
            at = start + (token * len(last) + channel - last.start) * first_plane_bits
            after = flip(case, byte=at // 8, bit=at % 8).attend(target)
            assert torch.equal(after, before) != moves, (token, channel, format.k_bits)
