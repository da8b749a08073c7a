"""The smallest budget at which a method still answers as wanted, found by measuring."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from occamkv.cache import Plan
from occamkv.errors import UnsupportedFormat, UnsupportedInput
from occamkv.evals.fidelity import read_together
from occamkv.integrations.transformers import plan_for
from occamkv.methods import Method

BUDGETS = tuple(round(2.4 + 0.1 * step, 1) for step in range(23))
"""Budgets that are tried, in bits per value."""


@dataclass(frozen=True)
class Setting:
    """A budget, the share of positions at which the most likely token stayed the same, and the plan that was chosen."""

    budget: float
    same_top: float
    plan: Plan


def wanted_share(text: str) -> float:
    """Return the share that a wish such as `same-top>=95%` asks for, 0 to 1.

    Raises:
        UnsupportedInput: It cannot be read.
    """
    found = re.fullmatch(r"same-top\s*>=\s*(\d{1,3}(?:\.\d+)?)\s*%", text.strip())
    if found is None or not 0 < float(found[1]) <= 100:
        raise UnsupportedInput(f"cannot read {text!r}; allowed: 'same-top>=95%', a share above 0 % and at most 100 %.")
    return float(found[1]) / 100


def smallest_budget(
    model: PreTrainedModel,
    ids: Tensor,
    chosen: Method,
    share: float,
    *,
    score_from: int,
    progress: Callable[[int, int], None] | None = None,
) -> Setting:
    """Return the smallest budget of `BUDGETS` with which at least `share` of the most likely tokens stay the same.

    A bisection, which takes the share to rise with the budget; the figure returned was measured. One text of a few
    thousand tokens decides, so leave a margin to what you need.

    Args:
        model: A causal language model in eval mode.
        ids: Tokens `[1, T]`, read through the cache.
        chosen: A method with a budget.
        share: From 0 to 1.
        score_from: First scored position.
        progress: Called with the budgets measured and the most there will be.

    Raises:
        UnsupportedInput: The method has no budget, or the largest budget does not reach the share.
    """
    if chosen.budget is None:
        raise UnsupportedInput(f"method {chosen} has no budget; allowed: auto, or another method with one.")
    best = _measure(model, ids, chosen.with_overrides(budget=BUDGETS[-1]), score_from)
    if best.same_top < share:
        raise UnsupportedInput(
            f"with {BUDGETS[-1]} bits {100 * best.same_top:.1f} % of the most likely tokens stay the same; "
            f"allowed: at most that, {100 * share:.1f} % were asked for."
        )
    low, high, tried = 0, len(BUDGETS) - 2, 1
    while low <= high:
        if progress is not None:
            progress(tried, len(BUDGETS).bit_length() + 1)
        middle, tried = (low + high) // 2, tried + 1
        try:
            setting = _measure(model, ids, chosen.with_overrides(budget=BUDGETS[middle]), score_from)
        except UnsupportedFormat:  # less than the cheapest codes of this model take
            low = middle + 1
            continue
        if setting.same_top >= share:
            best, high = setting, middle - 1
        else:
            low = middle + 1
    return best


def _measure(model: PreTrainedModel, ids: Tensor, chosen: Method, score_from: int) -> Setting:
    plans = {"": plan_for(model.config, chosen)}
    reading = read_together(model, ids, plans, score_from=score_from)[""]
    same = fmean(torch.cat(reading.tally.same).float().tolist())
    return Setting(chosen.budget or 0.0, same, reading.cache.plan)
