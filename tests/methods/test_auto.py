"""auto: budgets in names, the dial against brute force, and the trial against plain attention in float64."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occamkv import method
from occamkv.errors import UnsupportedFormat
from occamkv.methods import auto, trial
from occamkv.methods.auto import CODES, Dial, Option
from occamkv.methods.crossing import Statistics
from some_attention import some_balance, some_tokens

BITS = (2.3, 2.55, 3.3, 4.3)
ROUNDING = 1e-6
AUTO = method("auto")


def table(*errors: float) -> list[Option]:
    return [Option(bits, error, AUTO) for bits, error in zip(BITS, errors, strict=True)]


def spent(dial: Dial) -> float:
    return sum(option.bits for option in dial.chosen)


def error(dial: Dial) -> float:
    return sum(option.error for option in dial.chosen)


def run(tables: list[list[Option]], budget: float) -> Dial:
    dial = Dial(budget, len(tables))
    for options in tables:
        assert dial.choose(options, typical=table(0.02, 0.017, 0.005, 0.001)) in options
    return dial


def least_error(tables: list[list[Option]], budget: float) -> float:
    """The least sum of errors of all combinations within the budget."""
    fit = (c for c in product(*tables) if sum(o.bits for o in c) <= budget * len(tables) + ROUNDING)
    return min(sum(o.error for o in c) for c in fit)


some_errors = st.lists(st.floats(0, 1), min_size=len(BITS), max_size=len(BITS)).map(lambda e: table(*e))


@given(st.lists(some_errors, min_size=1, max_size=5), st.floats(BITS[0], 4.7))
@settings(deadline=None, max_examples=200)
def test_the_dial_keeps_its_budget_and_no_choice_beats_brute_force(tables, budget):
    dial = run(tables, budget)
    assert len(dial.chosen) == len(tables)
    assert spent(dial) <= budget * len(tables) + ROUNDING
    assert error(dial) >= least_error(tables, budget) - ROUNDING


@given(some_errors, st.floats(BITS[0], 4.7))
@settings(deadline=None, max_examples=100)
def test_one_layer_takes_the_best_that_fits(options, budget):
    assert math.isclose(error(run([options], budget)), least_error([options], budget))


@pytest.mark.parametrize("corner", range(len(BITS)))
def test_equal_layers_get_what_each_could_pay_alone(corner):
    options = table(1, 0.5, 0.2, 0.01)
    dial = Dial(BITS[corner], 6)
    chosen = [dial.choose(options) for _ in range(6)]
    assert chosen == [options[corner]] * 6
    assert math.isclose(error(dial), least_error([options] * 6, BITS[corner]))


def test_a_little_more_than_equal_layers_can_share_is_left_to_the_last():
    options = table(1, 0.5, 0.2, 0.01)
    dial = Dial(BITS[1] + 0.3, 4)
    chosen = [dial.choose(options) for _ in range(4)]
    assert [option.bits for option in chosen] == [BITS[1], BITS[1], BITS[1], BITS[2]]


def test_the_layer_that_needs_bits_gets_them():
    calm, hungry = table(0.004, 0.003, 0.001, 0.0002), table(4, 3, 1, 0.2)
    for place in range(6):
        dial = run([hungry if index == place else calm for index in range(6)], 2.7)
        assert dial.chosen[place].bits >= BITS[2]
        assert all(option.bits <= BITS[1] for index, option in enumerate(dial.chosen[:-1]) if index != place)


def test_both_ends_of_the_budget():
    tables = [table(1, 0.5, 0.2, 0.01), table(0.1, 0.09, 0.01, 0.005), table(3, 2.9, 1, 0)]
    assert [o.bits for o in run(tables, BITS[0]).chosen] == [BITS[0]] * 3
    assert [o.bits for o in run(tables, 4.7).chosen] == [BITS[3]] * 3
    with pytest.raises(UnsupportedFormat, match=r"budget is 2.2 bits per value, but this layer takes 2.30 at least"):
        Dial(2.2, 3).choose(tables[0])


def test_the_hull_leaves_out_what_no_price_buys():
    options = table(1, 0.9, 0.1, 0.2)
    assert [option.bits for option in auto.hull(options)] == [BITS[0], BITS[2]]


def test_a_name_says_its_budget():
    assert (AUTO.budget, str(AUTO)) == (3.0, "auto")
    assert str(method("auto_b2.5")) == "auto_b2.5"
    assert method("auto_b2.5") == method("auto", budget=2.5)
    assert str(method("auto", budget=4)) == "auto_b4"
    assert method(str(method("auto", budget=2.75, flush="block"))).budget == 2.75


@pytest.mark.parametrize("budget", [2.1, 4.8, math.nan, "3", True])
def test_a_budget_out_of_reach_is_refused(budget):
    with pytest.raises(UnsupportedFormat, match=r"budget is .*; allowed: 2.2 to 4.7"):
        method("auto", budget=budget)


def test_only_auto_has_a_budget():
    for give in (lambda: method("kivi_b3"), lambda: method("occam", budget=3.0)):
        with pytest.raises(UnsupportedFormat, match="has no budget"):
            give()
    with pytest.raises(UnsupportedFormat, match=r"a name is auto\[_bB\]"):
        method("auto_3")


# The trial.

HEADS, GQA, DIM, TOKENS = 2, 2, 32, 132
MOMENT = torch.eye(DIM).expand(HEADS, DIM, DIM)
STATISTICS = Statistics(some_balance(HEADS, DIM) ** 0.1, MOMENT)


def sample(reading: trial.Reading = trial.Reading(), *, v_scale: float = 1.0) -> trial.Sample:  # noqa: B008
    generator = torch.Generator().manual_seed(0)
    k, v = (some_tokens(HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    at = torch.arange(70, TOKENS, 3)
    q = torch.randn(HEADS * GQA, len(at), DIM, generator=generator)
    return trial.Sample(q, at, k, v * v_scale + (1 - v_scale), reading)


def outputs(given: trial.Sample, k: torch.Tensor, v: torch.Tensor, k_hat: torch.Tensor, v_hat: torch.Tensor, recent):
    """Attention in plain loops, float64: the output, the same with packed K, and with packed V."""
    found = []
    for head, row in product(range(HEADS * GQA), range(len(given.at))):
        at, kv = int(given.at[row]), head // GQA
        old = torch.arange(at + 1) <= at - recent

        def weights(keys, head=head, row=row, kv=kv, at=at):
            logits = keys[kv, : at + 1] @ given.q[head, row].double() * (given.reading.scale or DIM**-0.5)
            if given.reading.softcap is not None:
                logits = torch.tanh(logits / given.reading.softcap) * given.reading.softcap
            sink = 0 if given.reading.sinks is None else given.reading.sinks[head].double().exp()
            return logits.exp() / (logits.exp().sum() + sink)

        mixed_k, mixed_v = k.clone(), v.clone()
        mixed_k[:, : at + 1][:, old], mixed_v[:, : at + 1][:, old] = (
            k_hat[:, : at + 1][:, old],
            v_hat[:, : at + 1][:, old],
        )
        found.append([w @ x[kv, : at + 1] for w, x in ((weights(k), v), (weights(mixed_k), v), (weights(k), mixed_v))])
    return [torch.stack(part) for part in zip(*found, strict=True)]


READINGS = {
    "plain": trial.Reading(),
    "another scale": trial.Reading(scale=0.3),
    "a soft cap": trial.Reading(softcap=2.0),
    "sinks": trial.Reading(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@pytest.mark.parametrize("name", READINGS)
def test_errors_are_those_of_plain_attention(name):
    given, recent = sample(READINGS[name]), 33
    found = trial.errors(given, AUTO, STATISTICS, recent=recent)
    k, v = given.k.double(), given.v.double()
    for code in (CODES[0], CODES[3]):
        error, rotation = found.k[code]
        assert rotation == "balanced"
        one = auto.recipe(AUTO, code, code, k_rotation=rotation, feedback=False)
        stored = one.decode(one.encode(*(x[None, :, 4:] for x in (given.k, given.v)), balance=STATISTICS.balance))
        k_hat, v_hat = (torch.cat((x[:, :4], y[0].double()), dim=1) for x, y in zip((k, v), stored, strict=True))
        out, by_k, by_v = outputs(given, k, v, k_hat, v_hat, recent)
        energy = out.square().sum()
        assert error == pytest.approx(float((by_k - out).square().sum() / energy), rel=1e-3)
        assert found.v[code] == pytest.approx(float((by_v - out).square().sum() / energy), rel=1e-3)


def test_values_that_are_all_alike_leave_only_codes_of_v_without_error():
    alike = trial.errors(sample(v_scale=1e-3), AUTO, STATISTICS, recent=33)
    mixed = trial.errors(sample(), AUTO, STATISTICS, recent=33)
    assert max(error for error, _ in alike.k.values()) < 1e-4 < min(error for error, _ in mixed.k.values())


def test_no_statistics_no_rotation_of_k_and_no_feedback():
    found = trial.errors(sample(), AUTO, None, recent=33)
    assert {rotation for _, rotation in found.k.values()} == {"none"}
    some = auto.options(AUTO, found, kv_heads=HEADS, head_dim=DIM, feedback=False)
    assert not any(option.method.needs_model or option.method.budget for option in some)
    assert len(some) == len(CODES) ** 2


def test_typical_errors_fall_with_bits_and_with_smaller_groups():
    typical = auto.typical_errors("none")
    ordered = sorted(CODES, key=lambda code: (code[0], -code[1]))
    for errors in ([typical.k[code][0] for code in ordered], [typical.v[code] for code in ordered]):
        assert errors == sorted(errors, reverse=True)


def test_spread_takes_the_last_and_never_more_than_asked():
    assert list(trial.spread(3, 64)) == [0, 1, 2]
    assert list(trial.spread(256, 4)) == [63, 127, 191, 255]
    assert list(trial.spread(0, 4)) == []
