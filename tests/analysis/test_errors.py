"""What a method does to one layer's attention output, against plain loops in float64."""

from dataclasses import replace

import pytest
import torch

from occamkv.analysis.errors import QUERIES, LayerErrors, paper_errors
from occamkv.methods import method
from occamkv.methods.trial import Reading, spread
from occamkv.ops.rope import KeyBias, Rotary
from some_trace import DIM, GQA, HEADS, fixed_where_looked_at, layer

RECENT = 128


def plain_error(given, k_hat: torch.Tensor) -> float:
    """Relative error of the output when queries read `k_hat` `[H, T, D]` but for their newest 128 tokens."""
    start = max(RECENT, k_hat.shape[1] // 4)
    at = [start + i for i in spread(k_hat.shape[1] - start, QUERIES)]
    change = energy = 0.0
    for head in range(HEADS * GQA):
        k, v, other = (x[head // GQA].double() for x in (given.k[0], given.v[0], k_hat))
        for position in at:
            first = 0 if given.window is None else max(0, position + 1 - given.window)
            mixed = k.clone()
            mixed[: position - RECENT + 1] = other[: position - RECENT + 1]
            q = given.q[0, head, position].double() * (given.reading.scale or DIM**-0.5)
            o, o_hat = ((x[first : position + 1] @ q).softmax(0) @ v[first : position + 1] for x in (k, mixed))
            change, energy = change + float((o_hat - o).square().sum()), energy + float(o.square().sum())
    return (change / energy) ** 0.5


@pytest.mark.parametrize("name", ["kivi", "oscar", "occam"])
@pytest.mark.parametrize("window", [None, 200], ids=["full", "window"])
def test_errors_are_those_of_plain_attention(name, window):
    given = replace(layer(seed=3), window=window, reading=Reading(scale=0.4))
    errors, chosen = LayerErrors(given), method(name)
    balance = errors.statistics(chosen).balance
    stored, _ = chosen.decode(chosen.encode(given.k, given.v, balance=balance))
    assert errors.error(chosen) == pytest.approx(plain_error(given, stored[0]), rel=1e-3)


def test_the_first_quarter_of_a_long_text_has_no_queries():
    given, chosen = layer(seed=3, tokens=768), method("kivi")
    stored, _ = chosen.decode(chosen.encode(given.k, given.v))
    assert LayerErrors(given).error(chosen) == pytest.approx(plain_error(given, stored[0]), rel=1e-3)


def test_pinned_tokens_stay_as_they_are_and_groups_begin_behind_them():
    given, chosen, end = layer(seed=3), method("oscar"), 4 + 256
    behind, _ = chosen.decode(chosen.encode(given.k[:, :, 4:end], given.v[:, :, 4:end]))
    expected = plain_error(given, torch.cat((given.k[0, :, :4], behind[0]), dim=1))
    assert LayerErrors(given).error(chosen, pins=4) == pytest.approx(expected, rel=1e-3)


def test_rotation_hurts_where_queries_look_at_channels_in_which_keys_vary_little():
    tried = LayerErrors(fixed_where_looked_at())
    errors = paper_errors(tried)
    assert tried.overlap < 0.1
    assert errors["rotation+token_scale"] > 2 * errors["token_scale"]
    assert errors["balanced+token_scale"] < 0.6 * errors["rotation+token_scale"]


def test_the_overlap_of_even_queries_is_1_and_that_of_the_same_channels_above():
    assert LayerErrors(layer()).overlap == pytest.approx(1, abs=0.05)
    given = layer()
    weights = torch.ones(DIM)
    weights[:2] = 8
    tried = LayerErrors(replace(given, q=given.q * weights, k=given.k * weights))
    assert tried.overlap > 5
    errors = paper_errors(tried)
    assert errors["rotation"] < errors["none"]


def test_token_scale_helps_where_a_short_sink_shares_a_group():
    errors = paper_errors(LayerErrors(layer(sink_at=40)))
    assert errors["rotation+token_scale"] < 0.7 * errors["rotation"]
    even = paper_errors(LayerErrors(layer()))
    assert even["rotation+token_scale"] == pytest.approx(even["rotation"], rel=0.3)


def with_key_bias(given, size: float):
    """The same layer, whose keys hold a bias that turns fast."""
    pairs = torch.tensor([0, 3])
    vector = torch.zeros(HEADS, DIM).index_fill_(1, torch.cat((pairs, pairs + DIM // 2)), size)
    bias = KeyBias(Rotary(torch.tensor([1.0, 0.4]).double(), pairs, pairs + DIM // 2), vector)
    return replace(given, k=given.k + bias.rows(torch.arange(given.k.shape[2])[None]), key_bias=bias)


@pytest.mark.parametrize("name", ["oscar", "occam"])
def test_a_key_bias_is_taken_out_by_methods_that_do_so(name):
    given, chosen = with_key_bias(layer(seed=3), 40.0), method(name)
    errors = LayerErrors(given)
    known = errors.statistics(chosen)
    assert (known.key_bias is not None) == (name == "occam")
    stored, _ = chosen.decode(chosen.encode(given.k, given.v, balance=known.balance, key_bias=known.key_bias))
    assert errors.error(chosen) == pytest.approx(plain_error(given, stored[0]), rel=1e-3)
    untold = LayerErrors(replace(given, key_bias=None)).error(chosen)
    assert untold == errors.error(chosen) if name == "oscar" else untold > 1.5 * errors.error(chosen)
