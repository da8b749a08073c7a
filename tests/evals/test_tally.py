"""KL, perplexity and same-top-token rate against float64 formulas."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import Tensor

from occamkv.errors import UnsupportedInput
from occamkv.evals import Fidelity, Tally, fidelity

POSITIONS, VOCABULARY = 101, 250
NOISES = {"0.3": 0.3, "5": 5.0, "0.001": 0.001}
WIDTHS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

every_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


def some_logits(noise: float, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of a full and a packed run, `[n, vocabulary]`, and the tokens that came next."""
    generator = torch.Generator().manual_seed(seed)
    full = 3 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    packed = full + noise * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    return full.to(dtype), packed.to(dtype), torch.randint(VOCABULARY, (POSITIONS,), generator=generator)


def float64_fidelity(full: Tensor, packed: Tensor, targets: Tensor) -> Fidelity:
    """Compute everything from the definitions, in float64."""
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (full.double().numpy(), packed.double().numpy()))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    kl = np.where(p > 0, p * np.log(p / q), 0).sum(-1)
    at = np.arange(len(targets)), targets.numpy()
    return Fidelity(
        positions=len(kl),
        kl_mean=kl.mean(),
        kl_median=np.median(kl),
        kl_p99=np.quantile(kl, 0.99),
        same_top=np.mean(p.argmax(-1) == q.argmax(-1)),
        perplexity=np.exp(-np.log(q[at]).mean()),
        perplexity_full=np.exp(-np.log(p[at]).mean()),
    )


def tallied(*texts: tuple[Tensor, Tensor, Tensor]) -> Fidelity:
    tally = Tally()
    for text in texts:
        tally.add(*text)
    return tally.result()


def agrees(given: Fidelity, expected: Fidelity) -> bool:
    """Whether two results are the same figures but for float32 rounding."""
    return given.positions == expected.positions and asdict(given) == pytest.approx(
        asdict(expected), rel=2e-5, abs=5e-7
    )


@every_noise
@pytest.mark.parametrize("dtype", WIDTHS.values(), ids=WIDTHS)
def test_figures_are_those_of_the_float64_formulas(noise, dtype):
    logits = some_logits(noise, dtype)
    assert agrees(tallied(logits), float64_fidelity(*logits))


def test_equal_logits_have_kl_exactly_0_and_always_the_same_top_token():
    full, _, targets = some_logits(1.0)
    result = tallied((full, full.clone(), targets))
    assert (result.kl_mean, result.kl_median, result.kl_p99, result.same_top) == (0, 0, 0, 1)
    assert result.perplexity == result.perplexity_full


WRONG = {
    "packed against full": lambda full, packed, targets: (packed, full, targets),
    "targets one later": lambda full, packed, targets: (full, packed, targets.roll(1)),
    "positions shifted": lambda full, packed, targets: (full, packed.roll(1, 0), targets),
    "one position less": lambda full, packed, targets: (full[1:], packed[1:], targets[1:]),
    "a shade warmer": lambda full, packed, targets: (full, packed * 1.001, targets),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_figures_are_found(change):
    logits = some_logits(0.3)
    assert not agrees(tallied(change(*logits)), float64_fidelity(*logits))


def test_a_shift_of_all_logits_of_a_position_changes_nothing():
    full, packed, targets = some_logits(0.3)
    moved = packed + 4 * torch.randn(POSITIONS, 1, generator=torch.Generator().manual_seed(5))
    assert agrees(tallied((full, moved, targets)), float64_fidelity(full, packed, targets))


@pytest.mark.parametrize("rows", [1, 7, 100, 101])
def test_a_large_vocabulary_is_read_in_parts_with_the_same_figures(monkeypatch, rows):
    monkeypatch.setattr(fidelity, "_LOGITS_AT_ONCE", rows * VOCABULARY)
    logits = some_logits(0.3)
    assert agrees(tallied(logits), float64_fidelity(*logits))


def test_several_texts_count_by_their_positions():
    first, second = some_logits(0.3), some_logits(2.0, seed=1)
    second = tuple(x[:32] for x in second)
    together = float64_fidelity(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    assert agrees(tallied(first, second), together)
    assert not agrees(tallied(first), together)


def test_a_tally_takes_over_the_positions_of_another():
    first, second = some_logits(0.3), some_logits(2.0, seed=1)
    own, other = Tally(), Tally()
    own.add(*first)
    other.add(*second)
    alone = other.result()
    own.extend(other)
    assert own.result() == tallied(first, second) != tallied(first)
    assert other.result() == alone


def test_a_confident_model_is_no_division_by_zero():
    full = torch.full((3, 4), -1e4)
    full[:, 1] = 1e4
    result = tallied((full, full.clone(), torch.ones(3, dtype=torch.int64)))
    assert (result.kl_mean, result.perplexity) == (0, 1)


def test_nothing_added_is_refused():
    with pytest.raises(UnsupportedInput, match="no position was scored"):
        Tally().result()
