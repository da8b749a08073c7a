"""A key bias that was taken out of K comes back into the logits: against float64 attention on K with its bias."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_truth import attention, relative_error
from kernels.test_skips import SCATTERED, scattered
from kernels.test_workspace import LONG, long_case, peak
from occamkv import kernels
from occamkv.errors import UnsupportedInput
from occamkv.formats import Format
from occamkv.kernels import FullTokens
from occamkv.kernels.cpu import attention as cpu_attention
from occamkv.methods import Method
from occamkv.ops.rope import KeyBias
from scattered_pages import scatter
from some_attention import (
    METHODS,
    RAGGED,
    Case,
    Held,
    backend_or_skip,
    backends,
    cpu_backends,
    default_backends,
    make_case,
    pack,
)
from some_key_bias import bias_in, biased, some_bias, turned

HELD = (*RAGGED, Held(0, 1, 40, pads=1))
LOW, MIDDLE, HIGH = 62, 31, 0  # pairs of head_dim 128: a turn of 4.6 million, 1e3 .. and 6.3 tokens
SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0, float("-inf"), 1.5])


@backends
@pytest.mark.parametrize("queries", [1, 3, 8, 9, 40])
@pytest.mark.parametrize(("name", "gqa"), [("oscar", 1), ("quarot", 3), ("oscar-k4v3-balanced-with-float16-norms", 7)])
def test_the_bias_comes_back(backend, name, gqa, queries):
    case = make_case(METHODS[name], gqa=gqa, queries=queries, held=HELD)
    case = biased(case, some_bias(2, 64, 5, size=3.0))
    case.check(backend_or_skip(backend, METHODS[name]))


@backends
@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"vector": torch.zeros(3, 64)}, r"vector of key_bias .*\(3, 64\)", id="other heads"),
        pytest.param({"vector": torch.zeros(2, 32)}, r"vector of key_bias .*\(2, 32\)", id="another head_dim"),
        pytest.param({"vector": torch.zeros(2, 64, device="meta")}, "on meta", id="another device"),
        pytest.param({"vector": torch.full((2, 64), float("nan"))}, "NaN", id="a value that is none"),
        pytest.param({"vector": torch.ones(2, 64)}, "no pair turns", id="values outside the pairs"),
        pytest.param({"first": [0, 64]}, r"channels \[0, 64, .*below 64", id="a channel beyond head_dim"),
        pytest.param({"first": [-1, 1]}, r"channels \[-1, ", id="a channel below zero"),
        pytest.param({"first": [0, 0]}, "twice", id="a channel twice"),
        pytest.param({"first": [0]}, "for each frequency", id="too few channels"),
        pytest.param({"frequencies": [1.0, float("nan")]}, "NaN", id="a frequency that is none"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(backend, change, told):
    case, right = make_case(METHODS["oscar"]), some_bias(2, 64, 2, size=1.0)
    rotary = {name: torch.as_tensor(x) for name, x in change.items() if name != "vector"}
    wrong = KeyBias(replace(right.rotary, **rotary), change.get("vector", right.vector))
    target = backend_or_skip(backend, METHODS["oscar"])
    with pytest.raises(UnsupportedInput, match=told):
        replace(case, crossing=case.crossing | {"key_bias": wrong}).attend(target)


WRONG = {
    "sign": lambda b, p: (replace(b, vector=-b.vector), p),
    "turned backward": lambda b, p: (replace(b, rotary=replace(b.rotary, frequencies=-b.rotary.frequencies)), p),
    "no bias": lambda b, p: (None, p),
    "one position late": lambda b, p: (b, p + 1),
    "heads exchanged": lambda b, p: (replace(b, vector=b.vector.flip(0)), p),
}


@pytest.mark.parametrize("what", WRONG)
def test_twin_a_wrong_bias_breaks_the_check(what):
    case = make_case(METHODS["oscar"], held=HELD)
    right = biased(case, some_bias(2, 64, 5, size=3.0))
    wrong, first = WRONG[what](right.crossing["key_bias"], case.packed.first_position)
    with pytest.raises(AssertionError, match="error"):
        tampered = replace(right.with_packed(first_position=first), crossing=case.crossing | {"key_bias": wrong})
        tampered.check(kernels.backend("reference"))


# -- with everything else that attention does ----------------------------------------------------------------------


def masked(case, **given) -> dict:
    shape = (case.q.shape[0], case.q.shape[1], case.q.shape[2], case.mask_positions)
    shown = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    return {"mask": torch.randn(shape, generator=torch.Generator().manual_seed(2)).where(shown, -torch.inf), **given}


OPTIONS = {
    "a window": lambda case: {"window": 150},
    "a scale": lambda case: {"scale": 0.3},
    "a soft cap": lambda case: {"softcap": 3.0},
    "sinks": lambda case: {"sinks": SINKS},
    "a mask": masked,
    "all of them": lambda case: masked(case, window=150, scale=0.2, softcap=5.0, sinks=SINKS),
}


@backends
@pytest.mark.parametrize("queries", [5, 9])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_bias_comes_back_with(backend, option, queries):
    case = make_case(METHODS["oscar"], gqa=3, queries=queries, held=HELD)
    case = biased(case, some_bias(2, 64, 5, size=3.0))
    case.check(backend_or_skip(backend, METHODS["oscar"]), **OPTIONS[option](case))


@backends
@pytest.mark.parametrize("queries", [3, 9])
def test_the_bias_comes_back_to_tokens_between_pins(backend, queries):
    for seed in range(3):
        case = scattered(make_case(METHODS["oscar"], gqa=2, held=SCATTERED, queries=queries, seed=seed), SCATTERED)
        biased(case, some_bias(2, 64, 5, size=3.0)).check(backend_or_skip(backend, METHODS["oscar"]))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("head_dim", "pairs"), [(16, 8), (80, 17), (128, 1), (256, 128)])
def test_any_number_of_pairs(backend, head_dim, pairs, dtype):
    name = "kivi-k3v4-with-8-bit-metadata"
    case = make_case(METHODS[name], head_dim=head_dim, gqa=9, queries=2, held=HELD[:2], dtype=dtype)
    key_bias = some_bias(2, head_dim, pairs, size=2.0, interleaved=head_dim == 128)
    biased(case, key_bias).check(backend_or_skip(backend, METHODS[name]))


@backends
@pytest.mark.parametrize("queries", [1, 9])
def test_no_pairs_are_no_bias_to_the_bit(backend, queries):
    case, target = make_case(METHODS["oscar"], queries=queries), backend_or_skip(backend, METHODS["oscar"])
    none = replace(case, crossing=case.crossing | {"key_bias": some_bias(2, 64, 0, size=1.0)})
    assert torch.equal(none.attend(target), case.attend(target))


@backends
def test_the_bias_of_sequences_with_nothing_packed_and_of_packed_tokens_alone(backend):
    target, key_bias = backend_or_skip(backend, METHODS["oscar"]), some_bias(2, 64, 4, size=3.0)
    biased(make_case(METHODS["oscar"], held=(Held(0, 0, 0), Held(3, 0, 7))), key_bias).check(target)
    case = biased(make_case(METHODS["oscar"], held=(Held(0, 6, 0), Held(0, 2, 0)), queries=3), key_bias)
    slots = case.packed.lengths.max()
    alone = {name: getattr(case, name)[:, :, :slots] for name in ("k", "v")}
    at = case.packed.lengths[:, None] - 3 + torch.arange(3)
    replace(case, full=[], q_positions=at, positions=case.positions[:, :slots], **alone).check(target)


@cpu_backends
def test_the_bias_of_a_context_that_threads_share(backend, monkeypatch):
    case = biased(make_case(METHODS["oscar"], held=(Held(3, 61, 9),), queries=2), some_bias(2, 64, 5, size=3.0))
    target = backend_or_skip(backend, METHODS["oscar"])
    alone = case.attend(target)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    case.check(target)
    assert relative_error(case.attend(target), alone.double()) < 1e-6


@st.composite
def cases(draw):
    written = Format(
        k_bits=draw(st.sampled_from([2, 3, 4])),
        k_axis=draw(st.sampled_from(["channel", "token"])),
        k_group=draw(st.sampled_from([32, 64, 128])),
        metadata_bits=draw(st.sampled_from([8, 16])),
    )
    form = Method("oscar", written, k_rotation=draw(st.sampled_from(["none", "hadamard", "balanced"])))
    head_dim, heads, queries = 16 * draw(st.integers(1, 16)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rows = st.builds(Held, st.integers(0, 4), st.integers(0, 5), st.integers(0, 127), st.integers(0, queries))
    held, seed = draw(st.lists(rows, min_size=1, max_size=3)), draw(st.integers(0, 999))
    gqa = draw(st.sampled_from([1, 2, 3, 7, 16]))
    case = make_case(form, head_dim=head_dim, heads=heads, gqa=gqa, queries=queries, held=held, seed=seed)
    pairs = draw(st.sets(st.integers(0, head_dim // 2 - 1)))
    size, interleaved = draw(st.sampled_from([0.1, 1.0, 5.0])), draw(st.booleans())
    key_bias = bias_in(torch.tensor(sorted(pairs)).long(), heads, head_dim, size=size, interleaved=interleaved)
    options = {"window": draw(st.none() | st.integers(1, 300)), "softcap": draw(st.none() | st.just(4.0))}
    return biased(case, key_bias), options


@backends
@given(cases())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_small_case(backend, drawn):
    case, options = drawn
    case.check(backend_or_skip(backend, METHODS["oscar"]), **options)


# -- how exact the term is -------------------------------------------------------------------------------------------

TERM_ERROR = 3e-7
"""Of the largest that the term could be: scale times the lengths of query and bias in each pair, summed."""


def terms(key_bias: KeyBias, q: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes back to the logits of q `[1, Hq, 1, D]` at positions `[n]`, and the largest it could be, `[n, Hq]`."""
    group = q.shape[1] // len(key_bias.vector)
    rows = turned(key_bias, positions[None]).repeat_interleave(group, dim=1)[0]  # [Hq, n, D]
    lengths = []
    for x in (q[0, :, 0].double(), key_bias.vector.double().repeat_interleave(group, dim=0)):
        lengths.append(torch.hypot(x[:, key_bias.rotary.first], x[:, key_bias.rotary.second]))
    scale = q.shape[-1] ** -0.5
    most = scale * (lengths[0] * lengths[1]).sum(-1)
    return scale * (rows @ q[0, :, 0, :, None].double())[..., 0].T, most.expand(len(positions), -1)


@backends
@pytest.mark.parametrize("kept", ["packed", "in full precision"])
@pytest.mark.parametrize("start", [0, 77, 2**20 - 256])
@pytest.mark.parametrize(
    "pairs", [[LOW], [MIDDLE], [HIGH], [HIGH, MIDDLE, LOW], range(64)], ids=["low", "middle", "high", "three", "all"]
)
def test_the_term_of_a_bias_of_600_is_exact(backend, pairs, start, kept):
    """K is 0 but for its bias. A query sees one token, and a sink has the logit that this token should have."""
    target = backend_or_skip(backend, METHODS["kivi"])
    key_bias = bias_in(torch.tensor(list(pairs)), 2, 128, size=600.0)
    q = torch.randn(1, 14, 1, 128, generator=torch.Generator().manual_seed(0))
    zero, positions = torch.zeros(1, 2, 256, 128), start + torch.arange(256)
    full = FullTokens(zero, zero + 1, positions[None])
    form = METHODS["kivi"].packed_format
    packed = scatter([pack(zero[0], zero[0] + 1, METHODS["kivi"])], form, heads=2, head_dim=128, seed=0)
    packed = replace(packed, first_position=positions[:1])
    given = {"packed": packed, "full": []} if kept == "packed" else {"packed": None, "full": [full]}
    truth, most = terms(key_bias, q, positions)
    assert float(most.max()) > 30, "a twin: the term is large"
    for i in (0, 1, 31, 32, 100, 127, 128, 255):
        sinks = truth[i].float()
        at = positions[None, i : i + 1]
        out = target.attend(q, q_positions=at, window=1, sinks=sinks, key_bias=key_bias, **given)[0, :, 0].double()
        said = sinks.double() + torch.log(out / (1 - out)).mean(-1)
        assert ((said - truth[i]).abs() <= TERM_ERROR * most[i] + 2e-6).all()


def test_twin_a_position_too_far_and_frequencies_in_float32_break_the_bound():
    key_bias, positions = bias_in(torch.tensor([MIDDLE]), 2, 128, size=600.0), 2**20 + torch.arange(256)
    q = torch.randn(1, 14, 1, 128, generator=torch.Generator().manual_seed(0))
    truth, most = terms(key_bias, q, positions)
    rounded = replace(key_bias.rotary, frequencies=key_bias.rotary.frequencies.float().double())
    for wrong in (terms(key_bias, q, positions + 1)[0], terms(replace(key_bias, rotary=rounded), q, positions)[0]):
        assert ((wrong - truth).abs() > 10 * TERM_ERROR * most).float().mean() > 0.9


@pytest.mark.parametrize("queries", [1, 9])
@backends
@pytest.mark.parametrize("pair", [LOW, MIDDLE, HIGH], ids=["low", "middle", "high"])
def test_attention_with_a_bias_of_600_has_the_error_of_the_packed_tokens(backend, pair, queries):
    case = make_case(METHODS["oscar"], head_dim=128, gqa=7, queries=queries, held=HELD)
    case = biased(case, bias_in(torch.tensor([pair]), 2, 128, size=600.0))
    truth = attention(case.q.double(), case.k, case.v, q_positions=case.q_positions, positions=case.positions)
    assert relative_error(case.attend(backend_or_skip(backend, METHODS["oscar"])), truth) < 1e-3


# -- tables ------------------------------------------------------------------------------------------------------------


@default_backends
@pytest.mark.parametrize("queries", [1, 60])
def test_the_workspace_of_a_long_context_stays_small(backend, queries):
    """Eight pairs are 16 channels more beside 64, in each block; the tables of 16K positions take 32 KB."""
    backend_or_skip(backend, METHODS["oscar"])
    tokens, tables = LONG // 4, 2**18
    taken, without = (peak(make("oscar", tokens, queries), backend) for make in (biased_long, long_case))
    assert taken < 1.3 * without + tables < 1.3 * without + tokens * 64
    assert taken <= 1.01 * peak(biased_long("oscar", tokens // 2, queries), backend) + tables


def biased_long(name: str, tokens: int, queries: int) -> Case:
    case = long_case(name, tokens, queries)
    return replace(case, crossing=case.crossing | {"key_bias": some_bias(2, 64, 8, size=3.0)})


@cpu_backends
@pytest.mark.parametrize("held", [Held(0, 8, 0), Held(0, 0, 90)], ids=["packed", "full"])
def test_positions_beyond_the_tables_are_refused_before_anything_is_read(backend, held, monkeypatch):
    case = biased(make_case(METHODS["oscar"], held=(held,), queries=1), some_bias(2, 64, 5, size=3.0))
    target = backend_or_skip(backend, METHODS["oscar"])
    case = replace(case, full=[replace(part, positions=part.positions + 128) for part in case.full])
    monkeypatch.setattr(cpu_attention, "_positions", lambda packed, full: 100)
    with pytest.raises(UnsupportedInput, match="sequence 0 lies outside the 128 positions"):
        case.attend(target)


@cpu_backends
def test_positions_that_no_table_holds_are_refused(backend):
    case = biased(make_case(METHODS["oscar"], queries=1), some_bias(2, 64, 5, size=3.0))
    far = case.with_packed(first_position=case.packed.first_position + 2**24)
    with pytest.raises(UnsupportedInput, match="positions below 16777216"):
        far.attend(backend_or_skip(backend, METHODS["oscar"]))
