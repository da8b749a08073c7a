"""What `encode` makes: bytes counted to the last one, the same in any batch, decoded in the dtype that was given."""

import pytest
import torch

from occamkv import method
from paper_formulas import relative_error, some_kv

NAMES = (
    *("oscar", "kivi", "quarot", "rtn", "oscar_k3v2_g128", "kivi_k4v3_g64_m8", "rtn_k3v3_m8", "quarot_g64x32"),
    *("ott", "rotatekv", "kvarn", "kvarn_k2v4_g32_m8", "turboquant", "turboquant_k3v2_g64x32"),
)
every_name = pytest.mark.parametrize("name", NAMES)


@every_name
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (2, 80), (1, 256)], ids=lambda n: str(n))
def test_bytes_are_pages_times_page_bytes_and_the_sum_of_the_tensors(name, heads, head_dim):
    packed = method(name).encode(*some_kv(heads, head_dim, batch=2, tokens=384))
    assert packed.pages.count == 2 * 384 // 128
    page = method(name).packed_format.page_bytes(kv_heads=heads, head_dim=head_dim)
    assert packed.nbytes == page * packed.pages.count
    held = [packed.pages.records, packed.pages.norms, packed.pages.super_scales]
    assert packed.nbytes == sum(t.nbytes for t in held if t is not None)
    bits = method(name).bits_per_value(kv_heads=heads, head_dim=head_dim)
    assert bits == pytest.approx(8 * packed.nbytes / (2 * 2 * 384 * heads * head_dim))


def test_the_balance_vector_is_counted():
    balanced = method("oscar", k_rotation="balanced")
    packed = balanced.encode(*some_kv(2, 64), balance=torch.ones(2, 64))
    assert packed.nbytes == packed.pages.nbytes + 2 * 64 * 4


FIGURES = [
    ("oscar", {}, (8, 128), 3.015625),
    ("kivi", {}, (8, 128), 3.0),
    ("kivi", {}, (3, 64), 3.0),
    ("rtn", {}, (8, 128), 3.0),
    ("quarot", {}, (8, 128), 2.25),
    ("oscar", {}, (3, 64), 3 + 32 / 384),
    ("oscar", {"metadata_bits": 8, "norm_dtype": "float16"}, (3, 64), 2.549),
    ("oscar", {"metadata_bits": 8, "norm_dtype": "float16", "k_group": 64, "v_group": 64}, (3, 64), 2.296),
    ("full", {}, (3, 64), 16.0),
    ("occam", {}, (3, 64), 2.549),
    ("occam", {}, (8, 128), 2.512),
    ("occam_small", {}, (3, 64), 2.296),
    ("occam_small", {}, (8, 128), 2.260),
    ("occam_quality", {}, (8, 128), 2.512),
    ("ott", {}, (8, 128), 3.0),
    ("rotatekv", {}, (8, 128), 2.25),
    ("kvarn", {}, (8, 128), 3.258),
    ("turboquant", {}, (8, 128), 2.625),
    ("kivi", {"levels": "lloyd"}, (8, 128), 2.5),
]


@pytest.mark.parametrize(("name", "overrides", "shape", "bits"), FIGURES, ids=lambda x: str(x))
def test_bits_per_value_are_the_documented_figures(name, overrides, shape, bits):
    made = method(name, **overrides).bits_per_value(kv_heads=shape[0], head_dim=shape[1])
    assert made == pytest.approx(bits, abs=5e-4)


def packed_step_by_step(tokens: int, *, step: int, pins: int) -> int:
    """Append one token at a time; pack `step` tokens whenever the residual holds 128 or more."""
    packed = residual = 0
    for _ in range(max(0, tokens - pins)):
        residual += 1
        while residual >= 128:
            packed, residual = packed + step, residual - step
    return packed


@pytest.mark.parametrize("pins", [0, 4], ids=lambda p: f"{p} pins")
@pytest.mark.parametrize(
    ("flush", "k_group", "step"),
    [("block", 32, 128), ("rolling", 32, 32), ("rolling", 64, 64), ("rolling", 128, 128)],
)
def test_packed_tokens_and_bytes_are_those_of_packing_step_by_step(flush, k_group, step, pins):
    made = method("oscar", flush=flush, k_group=k_group, pins=f"first:{pins}" if pins else "none")
    page = made.packed_format.page_bytes(kv_heads=3, head_dim=64)
    for tokens in (0, 1, 3, 4, 127, 128, 129, 131, 132, 159, 160, 164, 255, 256, 300, 1000):
        packed = packed_step_by_step(tokens, step=step, pins=pins)
        assert made.packed_tokens(tokens) == packed
        size = made.nbytes(tokens, kv_heads=3, head_dim=64, dtype_bytes=2)
        assert size == -(-packed // 128) * page + (128 + pins) * 2 * 3 * 64 * 2
        if tokens:
            bits = made.bits_per_value(kv_heads=3, head_dim=64, tokens=tokens)
            assert bits == pytest.approx(8 * size / (2 * tokens * 3 * 64))


@every_name
def test_a_batch_gives_the_bytes_of_its_sequences_alone_and_of_their_pages_alone(name):
    k, v = some_kv(2, 80, batch=3, tokens=256)
    made = method(name)
    together = made.encode(k, v)
    for b in range(3):
        alone = made.encode(k[b : b + 1], v[b : b + 1])
        for page in range(2):
            tokens = slice(128 * page, 128 * (page + 1))
            one_page = made.encode(k[b : b + 1, :, tokens], v[b : b + 1, :, tokens])
            parts = zip(together.pages.tensors, alone.pages.tensors, one_page.pages.tensors, strict=True)
            for whole, sequence, single in parts:
                assert torch.equal(whole[2 * b + page], sequence[page])
                assert torch.equal(whole[2 * b + page], single[0])


def test_twin_two_sequences_have_different_bytes():
    packed = method("oscar").encode(*some_kv(2, 80, batch=2))
    assert not torch.equal(packed.pages.records[0], packed.pages.records[1])


@every_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_decode_returns_the_shape_and_dtype_that_were_given(name, dtype):
    k, v = (x.to(dtype) for x in some_kv(2, 80, batch=2))
    made = method(name)
    packed = made.encode(k, v)
    for given, stored in zip((k, v), made.decode(packed), strict=True):
        assert stored.shape == given.shape
        assert stored.dtype == dtype
        assert relative_error(stored, given) < 0.6
    plain = made.encode(k.to(torch.float32), v.to(torch.float32))
    assert torch.equal(packed.pages.records, plain.pages.records)


@every_name
def test_input_is_left_alone_and_strides_do_not_matter(name):
    k, v = some_kv(2, 64, batch=2)
    copies = k.clone(), v.clone()
    packed = method(name).encode(k, v)
    assert torch.equal(k, copies[0])
    assert torch.equal(v, copies[1])
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(method(name).encode(*strided).pages.records, packed.pages.records)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 112, 192, 256], ids=lambda d: f"head_dim {d}")
@pytest.mark.parametrize("name", ["oscar", "kivi", "quarot", "rtn", "kvarn", "turboquant"])
def test_more_bits_give_smaller_errors_at_every_head_dim(name, head_dim):
    k, v = some_kv(2, head_dim)
    errors = []
    for bits in (2, 3, 4):
        made = method(name, k_bits=bits, v_bits=bits)
        stored = made.decode(made.encode(k, v))
        errors.append([relative_error(s, x) for s, x in zip(stored, (k, v), strict=True)])
    for two, three, four in zip(*errors, strict=True):
        assert 0.62 > two > 1.7 * three > 1.7 * 1.7 * four
