"""How occamkv draws: one style, colours that need no colour vision, figures as PNG or as SVG to be put inside a page.

In an SVG, colours are CSS variables with the light colour as fallback, so that a page can show them on a dark ground.
The ground is transparent, one unit is one pixel, and the same data give the same bytes.
matplotlib is loaded when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from occamkv.errors import UnsupportedInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, OTHERS, GROUND = "#2b2f36", "#5d6570", "#e3e6ea", "#c3c9d1", "#ffffff"
# Light and dark twin of each colour: neighbours differ in lightness too, so no pair needs colour vision.
_COLOURS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff8f45"),
    ("#117733", "#4fbf7a"),
    ("#aa4499", "#dd88cc"),
    ("#a87900", "#e6c229"),
    ("#332288", "#9a8cff"),
    ("#2a9d8f", "#5eead4"),
    ("#882255", "#e0709f"),
    ("#7a7a1f", "#c5c55a"),
    ("#4a9fd8", "#a8d8ff"),
    ("#cc6677", "#f4a3ae"),
    ("#5f6b7a", "#aab4c0"),
)
COLOURS = len(_COLOURS)
_TWINS = {
    "--figure-ink": (INK, "#e6e8eb"),
    "--figure-muted": (MUTED, "#a3abb6"),
    "--figure-grid": (GRID, "#2e343c"),
    "--figure-ground": (GROUND, "#15181d"),
    "--figure-others": (OTHERS, "#4a525d"),
    **{f"--method-{index}": twins for index, twins in enumerate(_COLOURS)},
}
_VARIABLES = {light: name for name, (light, _) in _TWINS.items()}
_DOTS_PER_INCH = 160
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.dpi": 72,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
}


def need_matplotlib(what: str) -> None:
    """Raise `UnsupportedInput` unless `what`, a word for what shall be drawn, can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UnsupportedInput(f"{what} draws with matplotlib. Run: pip install 'occamkv[plots]'") from error


def positive(value: float) -> bool:
    """Whether a logarithmic axis can show the value."""
    return math.isfinite(value) and value > 0


def light(number: int) -> str:
    """Return the colour with this number for matplotlib; after the last one they start again."""
    return _COLOURS[number % COLOURS][0]


def colour(number: int) -> str:
    """Return the same as `light` for CSS; it changes with the ground."""
    return f"var({_VARIABLES[light(number)]}, {light(number)})"


def dark_colours() -> str:
    """Return the CSS declarations that make the figures readable on a dark ground."""
    return ";".join(f"{name}:{dark}" for name, (_, dark) in _TWINS.items())


@contextmanager
def house_style(salt: str = "", *, size: float = 12) -> Iterator[None]:
    """Draw with our settings, whatever the user's are; letters that matplotlib's font lacks are no news.

    Args:
        salt: Goes into the names inside an SVG; figures of one page need different ones.
        size: Of the letters, in points.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": salt, "font.size": size})
        yield


def save_png(figure: Figure, path: Path | str) -> None:
    """Write the figure as PNG, without a date or the name of a program."""
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def svg(figure: Figure, title: str) -> str:
    """Return the figure as an element for a page: named, without ids that could clash, fonts left to the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    body = text[text.index("</metadata>") + len("</metadata>") :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, body)
    width, height = (round(72 * float(inches)) for inches in figure.get_size_inches())
    label = escape(title)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
        + re.sub(r">\s+<", "><", body).strip()
    )


def _variable(found: re.Match[str]) -> str:
    attribute, shade = found.groups()
    name = _VARIABLES.get(shade)
    return f"{attribute}: {shade if name is None else f'var({name}, {shade})'}"
