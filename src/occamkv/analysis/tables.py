"""The parts of the analysis page that are text: what is shown of a result, its sinks, layers and advice as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from occamkv.html import code, note, number, section, table, text

ABSENT = "\N{EN DASH}"
"""Stands where nothing was measured."""

SETTINGS = {
    "none": "as it is",
    "rotation": "rotated",
    "token_scale": "scaled",
    "rotation+token_scale": "rotated, scaled",
    "balanced+token_scale": "balanced, rotated, scaled",
}
_MOST_SINKS, _LONGEST_TOKEN = 30, 40
_SYMBOLS = 0x2400  # U+2400 + n is the picture of control character n


@dataclass(frozen=True)
class Shown:
    """A result and the name it has on the page."""

    label: str
    data: Mapping[str, Any]

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """All layers, in order."""
        return sorted(self.data["layers"], key=lambda layer: int(layer["index"]))

    @property
    def packed(self) -> list[Mapping[str, Any]]:
        """The layers that are packed."""
        return [layer for layer in self.layers if layer["packs"]]

    @property
    def telling(self) -> list[Mapping[str, Any]]:
        """The layers that the first figures show: those that are packed; all, where none is."""
        return self.packed or self.layers

    @property
    def count(self) -> str:
        """How many layers `telling` are."""
        return f"{len(self.telling)} {'packed ' if self.packed else ''}layer{'' if len(self.telling) == 1 else 's'}"


def visible(token: object) -> str:
    """Return the text of a token in which nothing is invisible: blanks, control characters, direction marks."""
    given = str(token)
    cut = given if len(given) <= _LONGEST_TOKEN else given[: _LONGEST_TOKEN - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return "".join(_seen(character) for character in cut) or "(empty)"


def _seen(character: str) -> str:
    if character <= " ":
        return "\N{OPEN BOX}" if character == " " else chr(_SYMBOLS + ord(character))
    return character if character.isprintable() else f"[U+{ord(character):04X}]"


def measured(value: Any) -> bool:
    """Whether there is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value: Any, form: str = ".2f") -> str:
    """Return a number, or a dash where nothing was measured."""
    return format(value, form) if measured(value) else ABSENT


def ranges(values: Iterable[int]) -> str:
    """Return whole numbers with runs drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for value in sorted(set(values)):
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}" if a == b else f"{a}\N{EN DASH}{b}" for a, b in runs) or ABSENT


def _spread(values: Iterable[Any], form: str = ".2f") -> str:
    known = sorted(value for value in values if measured(value))
    ends = list(dict.fromkeys(format(value, form) for value in (known[:1] + known[-1:])))
    return "\N{EN DASH}".join(ends) or ABSENT


def sinks_section(results: Sequence[Shown]) -> str:
    """Return the sinks of each result with the text of their tokens."""
    return section(
        "Sinks",
        "Tokens that many queries look at though they say little. Ranges go over the layers that have the sink; norms "
        "are in units of the layer's median. Blanks and control characters are drawn as signs.",
        *(_each(results, _sinks)),
    )


def _sinks(result: Shown) -> str:
    found: dict[tuple[int, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for layer in result.layers:
        for sink in layer.get("sinks") or ():
            found.setdefault((sink["position"], sink["token"]), []).append((layer["index"], sink))
    if not found:
        return note("No sink was found.")
    heads = [
        "Token",
        "Position",
        _wrapped("Layers"),
        "Attention<br>received",
        "K norm",
        "V norm",
        "Massive<br>activation",
        _wrapped("Rules"),
    ]
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0][0]))
    rows = []
    for (position, token), places in ordered[:_MOST_SINKS]:
        sinks = [sink for _, sink in places]
        rules = dict.fromkeys(rule for sink in sinks for rule in sink.get("rules") or ())
        values = [_spread(sink.get(key) for sink in sinks) for key in ("received", "k_norm", "v_norm")]
        massive = _spread((sink.get("massive") for sink in sinks), ",.0f")
        layers = _wrapped(ranges(index for index, _ in places))
        rows.append(
            [
                f"<code>{text(visible(token))}</code>",
                f"{position:,}",
                layers,
                *values,
                massive,
                _wrapped(", ".join(rules)),
            ]
        )
    left = len(ordered) - len(rows)
    return table(heads, rows) + (note(f"{left:,} more in fewer layers are in the JSON.") if left else "")


def layers_section(results: Sequence[Shown]) -> str:
    """Return what was measured of each layer."""
    return section(
        "Layers",
        "Token norms in units of the layer's median; in groups: the largest over the smallest norm of 32 tokens. "
        "Sink rate: the share of heads with a sink. Latent: tokens with the norms of a sink but not its attention. "
        "Cosine: of the keys with their mean. Massive: the largest activation over the median. Bound and measured: "
        "the paper's lower bound of the error of a group of K, and that error.",
        *(_each(results, _layers)),
        note(f"{ABSENT} stands where nothing was measured."),
    )


def _layers(result: Shown) -> str:
    heads = ["Layer", "Heads", "K norm,<br>min", "K norm,<br>max", "in<br>groups", "V norm,<br>min", "Sink<br>rate"]
    heads += [_wrapped("Sinks at"), "Latent", "Cosine", "Massive", number("Bound", "measured")]
    keys = ["token_norm_min_over_median", "token_norm_max_over_median", "token_norm_group_ratio"]
    keys += ["v_norm_min_over_median", "sink_rate"]
    rows = [
        [
            _named(layer),
            number(f"{layer['query_heads']}/{layer['kv_heads']}", f"of {layer['head_dim']}"),
            *(shown(layer.get(key)) for key in keys),
            _wrapped(ranges(layer.get("sink_positions") or ())),
            ABSENT if layer.get("latent_positions") is None else f"{len(layer['latent_positions']):,}",
            shown(layer.get("key_cosine")),
            shown(layer.get("massive_max_over_median"), ",.0f"),
            number(shown(layer.get("error_bound"), ".3g"), shown(layer.get("error_measured"), ".3g")),
        ]
        for layer in result.layers
    ]
    return table(heads, rows, quiet=_unpacked(result))


def advice_section(results: Sequence[Shown]) -> str:
    """Return what each setting costs each layer, and the advice."""
    return section(
        "Advice",
        "Relative error of each layer's attention output with K in 2 bits: as it is, with token scale, rotated, both "
        "(the paper), and both after balancing; the least is bold. Gain: by how much rotation divides the error of "
        "what is scaled, and scale that of what is rotated. Overlap: whether queries look where K varies (1 is even).",
        *(_each(results, _advice)),
        note(f"{ABSENT} stands where nothing was measured; pale layers are not packed. Open an advice to read why."),
    )


def _advice(result: Shown) -> str:
    heads = ["Layer", *(label[0].upper() + label[1:].replace(", ", ",<br>") for label in SETTINGS.values())]
    heads += ["Gain,<br>rotation", "Gain,<br>scale", "Overlap", _wrapped("Advice")]
    rows = []
    for layer in result.layers:
        errors = {name: (layer.get("errors") or {}).get(name) for name in SETTINGS}
        known = [value for value in errors.values() if value is not None and measured(value)]
        costs = [number(shown(value, ".3f"), best=value in known and value == min(known)) for value in errors.values()]
        gains = [shown(layer.get(key)) for key in ("rotation_gain", "token_scale_gain", "query_overlap")]
        rows.append([_named(layer), *costs, *gains, _told(layer.get("advice") or {})])
    return table(heads, rows, quiet=_unpacked(result))


def _told(advice: Mapping[str, Any]) -> str:
    """Return the method with pins and overrides, and the reason folded below."""
    if not advice.get("method"):
        return ABSENT
    pins = advice.get("pins") if advice["method"] != "full" else None
    more = [] if pins is None else ["no pins" if pins == "none" else f"pins {text(pins)}"]
    more += [f"{text(key)} = {text(value)}" for key, value in (advice.get("overrides") or {}).items()]
    named = ", ".join([code(advice["method"]), *more])
    if not advice.get("why"):
        return f'<span class="why">{named}</span>'
    return f'<details class="why"><summary>{named}</summary><small>{text(advice["why"])}</small></details>'


def _named(layer: Mapping[str, Any]) -> str:
    return number(f"{layer['index']}", text(layer.get("kind") or ""))


def _unpacked(result: Shown) -> list[int]:
    return [row for row, layer in enumerate(result.layers) if not layer["packs"]]


def _wrapped(value: str) -> str:
    return f'<span class="why">{text(value)}</span>'


def _each(results: Sequence[Shown], part: Any) -> list[str]:
    """Return a part of each result, below its name if there are several."""
    return [(f"<h3>{text(one.label)}</h3>" if len(results) > 1 else "") + part(one) for one in results]
