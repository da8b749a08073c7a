"""Records do not depend on how a text is cut or batched; each token is packed once, at the right time, and stays."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_mirror import Mirror, assert_same_contents, contents, records_of
from occamkv.cache import waiting
from occamkv.cache.pool import PagePool
from occamkv.kernels import reference
from occamkv.methods import method
from some_attention import ASKS_AND_FINDS
from storage_meter import StorageMeter

FORMS = {
    "block": method("oscar"),
    "block with pins": method("kivi_m8", pins="first:4"),
    "rolling": method("oscar_roll"),
    "rolling with pins": method("oscar_k3v4_roll", pins="first:4"),
    "rolling in groups of 64": method("kivi_g64_roll"),
    "per token": method("quarot", pins="first:4"),
    "balanced": method("oscar", k_rotation="balanced", norm_dtype="float16"),
    **ASKS_AND_FINDS,
}
OUTLIERS = 0.04  # more than may be pinned, so that the allowance matters too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cache_of(form, k, v, cuts, *, attends=False, kept=None):
    """Put K and V into a cache in pieces that end at `cuts`."""
    mirror = Mirror(form, batch=k.shape[0], heads=k.shape[1], head_dim=k.shape[3], dtype=k.dtype)
    ends = [*sorted({c for c in cuts if 0 < c < k.shape[2]}), k.shape[2]]
    for start, end in pairwise([0, *ends]):
        seen = mirror.put(k[:, :, start:end], v[:, :, start:end], None if kept is None else kept[:, start:end])
        mirror.cache.note(seen)
        if attends:
            mirror.cache.attend(torch.zeros_like(k[:, :, start:end]), seen=seen)
    mirror.cache.commit()
    return mirror.cache


def some_kv(batch: int, count: int, dtype: torch.dtype, seed: int = 0):
    return Mirror(FORMS["block"], batch=batch, dtype=dtype, seed=seed, outliers=OUTLIERS).fresh(count)


@given(
    st.sampled_from(list(FORMS)),
    st.sampled_from(DTYPES),
    st.integers(1, 420),
    st.lists(st.integers(1, 419), max_size=6),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_records_do_not_depend_on_the_cuts(name, dtype, count, cuts, attends):
    k, v = some_kv(2, count, dtype)
    whole, pieces = cache_of(FORMS[name], k, v, []), cache_of(FORMS[name], k, v, cuts, attends=attends)
    for row in range(2):
        assert_same_contents(contents(whole, row), contents(pieces, row))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", FORMS)
def test_records_of_single_tokens_are_those_of_a_prompt(name, dtype):
    k, v = some_kv(1, 330, dtype)
    whole, pieces = cache_of(FORMS[name], k, v, []), cache_of(FORMS[name], k, v, range(330))
    assert_same_contents(contents(whole, 0), contents(pieces, 0))


@pytest.mark.usefixtures("reference_only")
def test_the_encoder_works_through_a_long_prompt_in_parts(monkeypatch):
    k, v = some_kv(2, 700, torch.float32)
    whole = cache_of(FORMS["rolling"], k, v, [])
    monkeypatch.setattr(waiting, "_SLICE_VALUES", 1)
    groups = []
    encode = reference.encode
    monkeypatch.setattr(reference, "encode", lambda k, v, **kw: groups.append(k.shape[0]) or encode(k, v, **kw))
    parts = cache_of(FORMS["rolling"], k, v, [])
    assert len(groups) > 3
    assert len(parts.store.pool.slabs) == len(whole.store.pool.slabs) == 1
    for row in range(2):
        assert_same_contents(contents(whole, row), contents(parts, row))


@given(
    st.sampled_from(list(FORMS)), st.sampled_from(DTYPES), st.integers(0, 99), st.lists(st.integers(1, 399), max_size=3)
)
@settings(deadline=None, max_examples=40)
def test_a_batch_equals_its_sequences_alone(name, dtype, seed, cuts):
    """Ragged left padding, also inside later chunks: what a sequence holds is what it would hold alone."""
    generator = torch.Generator().manual_seed(seed)
    k, v = some_kv(3, 400, dtype, seed)
    ends = [0, *sorted(set(cuts)), 400]
    kept = torch.ones(3, 400, dtype=torch.bool)
    for start, end in pairwise(ends):
        for row in range(3):
            kept[row, start : start + int(torch.randint(0, end - start, (1,), generator=generator))] = False
    together = cache_of(FORMS[name], k, v, cuts, kept=kept)
    for row in range(3):
        alone = cache_of(FORMS[name], *(x[row : row + 1][:, :, kept[row]] for x in (k, v)), [])
        assert_same_contents(contents(together, row), contents(alone, 0))


def test_twin_a_pad_that_entered_a_group_would_show():
    k, v = some_kv(1, 200, torch.float32)
    with_pad, without = cache_of(FORMS["block"], k, v, []), cache_of(FORMS["block"], k[:, :, 1:], v[:, :, 1:], [])
    with pytest.raises(AssertionError):
        assert_same_contents(contents(with_pad, 0), contents(without, 0))


@pytest.mark.parametrize(
    ("name", "prompt", "fewest", "most"),
    [
        pytest.param("block", 1, 0, 127, id="block keeps 0 to 127 tokens"),
        pytest.param("block with pins", 300, 0, 127, id="block with pins too"),
        pytest.param("rolling", 128, 96, 127, id="rolling keeps 96 to 127"),
        pytest.param("rolling with pins", 200, 96, 127, id="rolling with pins too"),
        pytest.param("rolling in groups of 64", 150, 64, 127, id="rolling by 64 keeps 64 to 127"),
        pytest.param("occam", 200, 96, 127, id="occam keeps 96 to 127"),
        pytest.param("turboquant", 1, 0, 127, id="turboquant keeps 0 to 127"),
    ],
)
def test_how_many_tokens_stay_unpacked_between_single_token_steps(name, prompt, fewest, most):
    mirror, seen = Mirror(FORMS[name]), set()
    q = torch.zeros(1, 2, 1, 32)
    for step in range(400):
        mirror.put(*mirror.fresh(prompt if step == 0 else 1))
        mirror.cache.attend(q)
        row = mirror.cache.store.rows[0]
        assert row.tokens == prompt + step
        if row.packed:
            seen.add(row.residual)
    assert seen == set(range(fewest, most + 1))


def spy_on_encode(cache, monkeypatch):
    """Collect the K that the backend encodes, `[N, H, G, D]` of each call."""
    encode, calls = cache.store.backend.encode, []

    def spy(k, v, **given):
        calls.append(k.clone())
        return encode(k, v, **given)

    monkeypatch.setattr(cache.store.backend, "encode", spy)
    return calls


@pytest.mark.usefixtures("reference_only")
@pytest.mark.parametrize("name", ["kivi", "kivi_roll", "rtn"])
@pytest.mark.parametrize("pins", ["none", "first:4", "first:4+found", "lowest:5"])
def test_each_token_is_quantized_exactly_once(name, pins, monkeypatch):
    """These methods do not rotate, so K can carry the number of its token."""
    mirror = Mirror(method(name, pins=pins))
    calls, number = None, 0
    for count in (140, 1, 1, 60, 1, 300, *[1] * 140):
        k, v = mirror.fresh(count)
        k[..., 0] = torch.arange(number, number + count)
        number += count
        mirror.put(k, v)
        calls = spy_on_encode(mirror.cache, monkeypatch) if calls is None else calls
        mirror.cache.attend(torch.zeros_like(k))
    numbers = torch.cat([k[:, 0, :, 0].flatten() for k in calls])
    row = mirror.cache.store.rows[0]
    assert len(row.pins) == {"none": 0, "first:4": 4, "lowest:5": 5}.get(pins, row.pinned) and row.packed > 380
    assert numbers.tolist() == [at for at in range(number) if at not in row.pins][: row.packed]


@pytest.mark.parametrize("name", FORMS)
def test_written_records_never_change(name):
    mirror = Mirror(FORMS[name], batch=2, outliers=OUTLIERS)
    mirror.step(300)
    before = [records_of(mirror.cache, row) for row in range(2)]
    for count in (1, 50, 1, 200, 1):
        mirror.step(count)
    for row in range(2):
        after = records_of(mirror.cache, row)
        assert after[0].shape[0] > before[row][0].shape[0]
        assert_same_contents([new[: old.shape[0]] for new, old in zip(after, before[row], strict=True)], before[row])


def cost_of_decoding(context: int, monkeypatch) -> dict[str, int]:
    """What 256 tokens cost on top of a prompt: bytes written to pages, calls of the encoder, bytes of new storages."""
    mirror, written = Mirror(FORMS["rolling"]), []
    mirror.put(*mirror.fresh(context))
    mirror.cache.commit()
    calls, write = spy_on_encode(mirror.cache, monkeypatch), PagePool.write

    def spy(pool, records, **places):
        written.append(sum(t.nbytes for t in records if t is not None))
        write(pool, records, **places)

    monkeypatch.setattr(PagePool, "write", spy)
    k, v = mirror.fresh(1)
    with StorageMeter() as meter:
        for _ in range(256):
            mirror.cache.update(k, v)
            mirror.cache.commit()
    monkeypatch.undo()
    return {"written": sum(written), "writes": len(written), "encodes": len(calls), "made": meter.made}


def test_appending_costs_the_same_at_any_length(monkeypatch):
    short, long = (cost_of_decoding(context, monkeypatch) for context in (1024, 8192))
    assert short == long
    form = FORMS["rolling"].packed_format
    assert short["writes"] == short["encodes"] == 256 // 32
    assert short["written"] == 8 * (2 * form.sections(32).record_bytes + 32 * form.norm_bytes)
