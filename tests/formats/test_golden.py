"""The bytes of records are those of the golden file, in one call or group by group, alone or in a batch."""

import json

import numpy as np
import pytest
import torch

import slow_decoder
from formats.golden import CASES, GOLDEN_FILE, describe, golden_input, golden_records
from occamkv.formats.records import Records, decode, encode

GOLDEN = json.loads(GOLDEN_FILE.read_text())
every_case = pytest.mark.parametrize("name", CASES)


def test_every_case_is_in_the_file_and_nothing_else():
    assert GOLDEN["schema_version"] == 1
    assert GOLDEN["records"].keys() == CASES.keys()
    assert sum("data" in entry for entry in GOLDEN["records"].values()) >= 2


@every_case
def test_records_are_the_golden_bytes(name):
    assert describe(golden_records(CASES[name])) == GOLDEN["records"][name]


@every_case
def test_twin_one_changed_value_changes_the_golden_bytes(name):
    case = CASES[name]
    k, v = golden_input(case)
    v[0, -1, 5, 6] = -v[0, -1, 5, 6] - 0.5
    changed = describe(encode(k, v, format=case.format, grid=case.grid, clip=case.clip))
    assert changed["sha256"] != GOLDEN["records"][name]["sha256"]


def from_hex(digits: str | None, dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
    if digits is None:
        return None
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("name", [name for name, entry in GOLDEN["records"].items() if "data" in entry])
def test_golden_bytes_can_still_be_read(name):
    case, entry = CASES[name], GOLDEN["records"][name]
    groups, heads, size = entry["shape"]
    records = Records(
        from_hex(entry["data"], torch.uint8, groups, heads, size),
        from_hex(entry["norms"], getattr(torch, case.format.norm_dtype), groups, case.format.record_tokens),
        from_hex(entry["super_scales"], torch.float16, groups, heads, 2),
    )
    read = decode(records, format=case.format, head_dim=case.head_dim)
    slow = slow_decoder.decode(records, case.format, case.head_dim)
    for said, slowly, given in zip(read, slow, golden_input(case), strict=True):
        assert np.array_equal(said.numpy(), slowly)
        assert ((said - given).norm() / given.norm()) < 0.35


def test_the_input_has_values_on_rounding_boundaries():
    case = CASES["2-bit per channel, one head of 8"]
    k, _ = golden_input(case)
    said, _ = slow_decoder.read_record(golden_records(case).data[0, 0].numpy(), case.format, 8, None)
    assert (said.scale[0], said.minimum[0]) == (1.0, 0.0)
    ties = {0.5: 0, 1.5: 2, 2.5: 2}
    assert {float(x): int(c) for x, c in zip(k[0, 0, :, 0], said.codes[:, 0], strict=True) if x % 1} == ties
    assert k[0, 0, :, 3].min() == 1 + 2**-11, "halfway between two float16 numbers"
    assert said.minimum[3] == 1.0
    assert said.scale[2] == said.minimum[2] == 0.0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format.levels == "lloyd"])
def test_no_root_mean_square_is_so_near_a_tie_that_the_order_of_its_sum_decides(name):
    """Sums of squares are not the same to the last bit on every processor; golden bytes must be."""
    case = CASES[name]
    k, v = (x.double().numpy() for x in golden_input(case))
    norms = golden_records(case).norms
    if norms is not None:
        k = k / np.where(norms > 0, norms, 1.0)[:, None, :, None]
    for x, side in zip((k, v), slow_decoder.sides(case.format, case.head_dim), strict=True):
        group = side.group_of()
        for g in np.unique(group):
            mantissa, _ = np.frexp(np.sqrt(np.square(x[..., group == g]).mean(-1)))
            assert np.abs(mantissa * 2**11 % 1 - 0.5).min() > 5e-4, "four roundings of float32"


def joined(parts: list[Records]) -> Records:
    return Records(*(None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True)))


@every_case
def test_group_by_group_gives_the_bytes_of_one_call(name):
    case = CASES[name]
    how = {"format": case.format, "grid": case.grid, "clip": case.clip}
    k, v = (torch.cat([x, x.flip(0) * 1.5, x.roll(3, -2)]) for x in golden_input(case))
    together = describe(encode(k, v, **how))
    one_by_one = [encode(k[i : i + 1], v[i : i + 1], **how) for i in range(len(k))]
    assert describe(joined(one_by_one)) == together
    in_another_batch = encode(torch.cat([k * 3, k]), torch.cat([v - 1, v]), **how)
    assert describe(Records(*(None if x is None else x[len(k) :] for x in in_another_batch))) == together


def test_twin_groups_in_another_order_give_other_bytes():
    case = CASES["2-bit per token over the whole head"]
    k, v = golden_input(case)
    backwards = [encode(k[i : i + 1], v[i : i + 1], format=case.format) for i in (1, 0)]
    assert describe(joined(backwards)) != describe(encode(k, v, format=case.format))


def test_strided_input_gives_the_same_bytes():
    case = CASES["4-bit K, 3-bit V, groups of 64, padded head_dim"]
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in golden_input(case))
    assert describe(encode(k, v, format=case.format)) == describe(golden_records(case))
