"""The receipt: what a packed cache did on a prompt of the user's own, as JSON that shows whether it was edited.

Three proofs meet in it. The bytes of the live cache are those of its tensors and of the formula. Shadows tell the
error of attention on sampled steps of the live run. A second pass reads the prompt through a packed and a full cache
(KL, same top token), with controls: full precision against itself gives 0, and flipped bits move the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from occamkv.cache import CacheReport, Plan
from occamkv.errors import UnsupportedInput
from occamkv.evals import controls
from occamkv.evals.about import about_model
from occamkv.evals.controls import Control
from occamkv.evals.fidelity import Fidelity, Reading, Tally, read_together
from occamkv.evals.receipt_words import verdict
from occamkv.formats import PAGE_TOKENS
from occamkv.integrations.transformers import PackedCache, plan_for
from occamkv.integrations.transformers.layer import PackedLayer
from occamkv.methods import Method
from occamkv.schema import NUMBER, check_fields, check_version

SCHEMA_VERSION = 1
SCORED_TOKENS = 384

_WHAT = "occamkv receipt"
_COMMAND = "occamkv run --receipt"
_PACKED, _FULL = "packed cache", "full"
_LAYER = {"index": NUMBER, "method": str, "packed_bytes": NUMBER, "full_bytes": NUMBER, "live?": {"steps": NUMBER}}
_RECEIPT = {
    "what": str,
    "model": {"name": str, "model_type": str, "fingerprint": str, "dtype": str},
    "plan": {"layers": [{"index": NUMBER, "method": str}]},
    "prompt": {"tokens": NUMBER, "ids_sha256": str, "text_sha256?": str},
    "generated?": {"tokens": NUMBER, "ids_sha256": str},
    "bytes": dict.fromkeys(("computed?", "measured", "cache", "full", "shadows"), NUMBER),
    "layers": [_LAYER],
    "live?": {"steps": NUMBER, "packed_layers": NUMBER, "error_mean?": NUMBER, "error_max?": NUMBER},
    "fidelity?": {"positions": NUMBER, "kl_mean": NUMBER, "same_top": NUMBER, "perplexity": NUMBER},
    "fidelity_skipped?": str,
    "controls": [{"name": str, "passed": bool, "told": str}],
    "void": bool,
    "verdict": str,
    "sha256": str,
}


@dataclass(frozen=True)
class SecondPass:
    """What a second pass over the prompt found, or why there was none; `full_bytes`: of the full cache."""

    fidelity: Fidelity | None = None
    skipped: str | None = None
    full_bytes: int | None = None
    controls: tuple[Control, ...] = ()


def second_pass(
    model: PreTrainedModel,
    ids: Tensor,
    chosen: Plan | Method | str,
    *,
    scored_tokens: int = SCORED_TOKENS,
    min_tokens: int = 0,
    controlled: bool = True,
    progress: Callable[[int], None] | None = None,
) -> SecondPass:
    """Compare a packed and the full cache on the tail of a prompt: its head in one call, as `generate` reads it.

    Args:
        model: A causal language model in eval mode.
        ids: The prompt, `[1, T]`.
        chosen: A method, its name, or a plan.
        scored_tokens: So many predictions at the end of the prompt count, as far as they read packed tokens.
        min_tokens: As in `PackedCache`.
        controlled: Also run the controls: full precision against itself, flipped bits, reads and bytes.
        progress: Called with the number of tokens read so far.
    """
    plan = chosen if isinstance(chosen, Plan) else plan_for(model.config, chosen)
    length, first = ids.shape[1], max((entry.method.packing_starts for entry in plan.layers if entry.packs), default=0)
    skipped = _too_short(plan, length, first, min_tokens)
    if skipped is not None:
        return SecondPass(skipped=skipped)
    start = max(first, length - 1 - scored_tokens)
    plans = {_PACKED: plan, **({_FULL: plan_for(model.config, _FULL)} if controlled else {})}
    readings = read_together(
        model, ids, plans, score_from=start, one_shot=start, min_tokens=min_tokens, progress=progress
    )
    packed, checks = readings[_PACKED], list[Control]()
    if controlled:
        checks = [
            controls.full_agrees(readings[_FULL]),
            controls.was_read_packed(_PACKED, packed),
            controls.bytes_match(_PACKED, packed),
            controls.flipped_bits_move_logits(_PACKED, model, packed, ids[:, -1:].to(model.device)),
        ]
    return SecondPass(packed.tally.result(), None, packed.full_bytes, tuple(checks))


def _too_short(plan: Plan, length: int, first: int, min_tokens: int) -> str | None:
    """Return why a prompt of this length shows nothing of a plan, or None."""
    needed = max(2 * PAGE_TOKENS, first + 2)
    if not plan.packed_layers:
        return "nothing is packed"
    if length < min_tokens:
        return f"the prompt has {length} tokens; nothing is packed below --min-tokens {min_tokens}"
    if length < needed:
        return f"the prompt has {length} tokens; at least {needed} are needed to read packed ones"
    return None


def receipt(
    model: PreTrainedModel,
    ids: Tensor,
    cache: PackedCache,
    *,
    proof: SecondPass | None = None,
    generated: Tensor | None = None,
    text: str | None = None,
    name: str | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the receipt of a run, JSON-ready and sealed by its hash.

    Args:
        model: The model that ran.
        ids: The prompt, `[1, T]`.
        cache: The cache of the run, as it was left; what is due in it is packed. Made with `verify`, it tells the error
            of the live run.
        proof: What `second_pass` found; by default it runs now.
        generated: The tokens that were generated, `[n]`.
        text: The prompt as text; only its hash is kept.
        name: What to call the model; default: its own `name_or_path`.
        conditions: Machine, versions, date and command.

    Raises:
        UnsupportedInput: `ids` is no single prompt, or the cache has a `pin_bias`.
    """
    held = [layer.cache for layer in cache.layers if isinstance(layer, PackedLayer) and layer.cache is not None]
    if any(layer.pin_bias is not None for layer in held):
        raise UnsupportedInput("pin_bias moves attention, so the full cache is no measure of this run. Leave it out.")
    for layer in held:
        layer.commit()  # a short last step would wait for the next one
    if proof is None:
        proof = second_pass(model, ids, cache.plan, min_tokens=max((one.min_tokens for one in held), default=0))
    shadowed = any(isinstance(layer, PackedLayer) and layer.shadow is not None for layer in cache.layers)
    report = cache.report(verify=shadowed)
    live = [controls.bytes_match("live cache", Reading(Tally(), cache))] if report.quantized else []
    checks = [*proof.controls, *live]
    told: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "what": _WHAT,
        "conditions": dict(conditions or {}),
        "model": {**about_model(model), **({} if name is None else {"name": name})},
        "plan": cache.plan.to_json(),
        "prompt": {
            "tokens": ids.shape[1],
            "ids_sha256": _hash(ids[0].tolist()),
            "text_sha256": None if text is None else sha256(text.encode()).hexdigest(),
        },
        "generated": None if generated is None else {"tokens": len(generated), "ids_sha256": _hash(generated.tolist())},
        **_measured(report, controls.packed_bytes(cache)),
        "fidelity": None if proof.fidelity is None else proof.fidelity.to_json(),
        "fidelity_skipped": proof.skipped,
        "controls": [check.to_json() for check in checks],
        "void": not all(check.passed for check in checks),
    }
    return seal({**told, "verdict": verdict(told)})


def _measured(report: CacheReport, packed: tuple[int, int, int]) -> dict[str, Any]:
    """Return the bytes, the layers and what the shadows saw; `packed` as `controls.packed_bytes` returns them."""
    reported, _, computed = packed
    live = {} if report.verification is None else {each.index: each for each in report.verification.layers}
    return {
        "bytes": {
            "computed": computed if report.quantized else None,
            "measured": reported,
            "cache": report.nbytes,
            "full": report.full_bytes,
            "shadows": report.shadow_bytes,
        },
        "layers": [
            {**asdict(layer), "live": asdict(live[layer.index]) if layer.index in live else None}
            for layer in report.layers
        ],
        "live": None if report.verification is None else report.verification.to_json(),
    }


def seal(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a receipt with the hash of everything else in it: a sum against edits and accidents, not a signature."""
    data = json.loads(json.dumps({name: value for name, value in told.items() if name != "sha256"}))
    return {**data, "sha256": _hash(data)}


def _hash(data: Any) -> str:
    """Return the SHA-256 of data as JSON with sorted keys and no spaces, in ASCII, in hex."""
    return sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check(data: Any) -> None:
    """Accept a receipt that is as it was written.

    Raises:
        UnsupportedInput: It is none, of another version, or was edited.
    """
    check_version(data, SCHEMA_VERSION, _COMMAND)
    check_fields(data, _RECEIPT, "the receipt", command=_COMMAND)
    given, own = data["sha256"], seal(data)["sha256"]
    if given != own:
        raise UnsupportedInput(
            f"this receipt was changed after it was written: it says sha256 {given[:16]}..., its content has "
            f"{own[:16]}.... Make a new one: `{_COMMAND} FILE`."
        )


def read_receipt(path: str | Path) -> dict[str, Any]:
    """Read a receipt file and check that it is as it was written.

    Raises:
        UnsupportedInput: The file is missing, or `check` does not accept it.
    """
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UnsupportedInput(f"cannot read the receipt {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise UnsupportedInput(f"the receipt {str(path)!r} is no JSON ({error}).") from error
    check(data)
    return data
