"""A page that needs nothing but itself: escaped text, numbers, tables, sections, and the shell around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

_FEW_COLUMNS = 6

_LIGHT = (
    "--ground:#fff;--soft:#f6f7f9;--ink:#1f2328;--muted:#5d6570;--line:#e3e6ea;--strong:#aab2bd;"
    "--bad:#b42318;--bad-ground:#fef2f1;--good:#117733"
)
_DARK = (
    "--ground:#15181d;--soft:#1c2026;--ink:#e6e8eb;--muted:#a3abb6;--line:#2e343c;--strong:#5b6471;"
    "--bad:#ff8d83;--bad-ground:#3a1a19;--good:#4fbf7a"
)
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
 font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:940px;margin:0 auto;padding:44px 20px 64px}
h1{font-size:26px;line-height:1.25;font-weight:650;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;line-height:1.35;font-weight:650;margin:0 0 4px}
h3{font-size:14px;font-weight:650;margin:20px 0 8px}
p{margin:0 0 12px;overflow-wrap:anywhere}
section{margin-top:44px}
.under,.lead,.note{color:var(--muted)}
.lead{margin-bottom:16px;max-width:76ch}
.note{font-size:13px;margin:10px 0 0;max-width:90ch}
.verdict{font-size:17px;line-height:1.6;margin:24px 0 0;max-width:80ch}
.banner{border:1px solid var(--bad);border-left-width:5px;border-radius:6px;background:var(--bad-ground);
 padding:12px 16px;margin:24px 0 0}
.banner strong{color:var(--bad)}
.banner ul{margin:6px 0 0;padding-left:20px}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em;
 overflow-wrap:anywhere}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:12px 14px;margin:0 0 12px;
 white-space:pre-wrap;user-select:all}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px;line-height:1.4;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);font-weight:400;
 white-space:nowrap}
th:first-child,td:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--muted);vertical-align:bottom;border-bottom-color:var(--strong);white-space:normal;line-height:1.3}
tr.reference>*{color:var(--muted);border-top:1px solid var(--strong)}
.text,th:first-child{text-align:left}
tbody th{min-width:132px;max-width:260px;white-space:normal;overflow-wrap:anywhere}
.few{width:auto}
.few th+th,.few td{padding-left:28px}
td b{font-weight:700}
small{display:block;font-size:11.5px;color:var(--muted)}
.name{display:flex;gap:7px;align-items:baseline}
.name i{flex:none;width:9px;height:9px;border-radius:50%}
.name+small{padding-left:16px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:12px 0 16px;font-size:14px}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
.controls{list-style:none;padding:0;margin:0;font-size:14px}
.controls li{padding:3px 0}
.passed{color:var(--good);font-weight:650}
.failed{color:var(--bad);font-weight:650}
figure{margin:0}
svg{display:block;max-width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(205px,1fr));gap:18px 12px}
.panels figure{align-self:end}
.scroll+svg{margin-top:20px}
.pair{display:grid;grid-template-columns:repeat(var(--columns,2),minmax(0,1fr));gap:24px 20px;align-items:end}
.pair figcaption{font-size:13px;line-height:1.4;margin:0 0 6px;color:var(--muted);overflow-wrap:anywhere}
.pair figcaption b{display:block;font-size:15px;color:var(--ink)}
.pair>div{align-self:start}
.said{margin-bottom:8px;max-width:76ch}
.said b{font-size:17px}
.why{display:block;max-width:300px;white-space:normal;text-align:left}
details{margin-top:16px}
summary{cursor:pointer;font-weight:650;font-size:14px}
td details{margin:0;min-width:180px}
td summary{font-weight:400;font-size:inherit}
.panels figcaption{font-size:12.5px;line-height:1.3;margin:0 0 3px;overflow-wrap:anywhere}
footer{margin-top:44px;padding-top:12px;border-top:1px solid var(--line);color:var(--muted);font-size:13px}
@media(max-width:760px){table{font-size:12px}th,td{padding:6px 5px}small{font-size:10.5px}tbody th{min-width:104px}}
@media(max-width:620px){.pair{grid-template-columns:minmax(0,1fr)}}
@media(max-width:560px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:6px}}
@media print{main{max-width:none;padding:0}section,figure,tr{break-inside:avoid}}
"""


def printable(value: object) -> str:
    """Return anything as text in which a replacement sign stands for what cannot be printed or encoded."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def text(value: object) -> str:
    """Return anything as HTML."""
    return escape(printable(value))


def code(value: object) -> str:
    """Return a name as the user typed it; it may be broken after an underscore."""
    return f"<code>{text(value).replace('_', '_<wbr>')}</code>"


def percent(share: float) -> str:
    """Return a share, 0 to 1, in percent."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def mib(nbytes: float) -> str:
    """Return bytes in MiB."""
    return f"{nbytes / 2**20:,.2f}\N{NO-BREAK SPACE}MiB"


def number(shown: str, small: str | None = None, *, best: bool = False) -> str:
    """Return a cell: the number, bold if it is the best, and what belongs below it in small."""
    return (f"<b>{shown}</b>" if best else shown) + (f"<small>{small}</small>" if small else "")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, quiet: Collection[int] = ()) -> str:
    """Return a table: the first column names things, the others hold numbers; every cell is HTML already.

    Args:
        heads: The first row.
        rows: The others.
        quiet: Indices of rows that are no more than a reference.
    """
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "".join(
        f'<tr{" class=reference" if index in quiet else ""}><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>"
        for index, cells in enumerate(rows)
    )
    few = ' class="few"' if len(heads) <= _FEW_COLUMNS else ""
    return f'<div class="scroll"><table{few}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def section(title: str, lead: str, *parts: str) -> str:
    """Return a part of the page; title, lead and parts are HTML already, and empty parts are left out."""
    inner = "\n".join(part for part in parts if part)
    return f'<section><h2>{title}</h2>\n<p class="lead">{lead}</p>\n{inner}</section>'


def note(sentence: str) -> str:
    """Return a small sentence below a table or figure."""
    return f'<p class="note">{sentence}</p>'


def facts(told: Mapping[str, str]) -> str:
    """Return names beside what is said of them, which is HTML already."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{what}</dd>" for name, what in told.items()) + "</dl>"


def panels(figures: Sequence[tuple[str, str]]) -> str:
    """Return small figures side by side, each as its caption and its SVG."""
    inner = "".join(f"<figure><figcaption>{name}</figcaption>{svg}</figure>" for name, svg in figures)
    return f'<div class="panels">{inner}</div>'


def side_by_side(cells: Sequence[str], *, columns: int = 2) -> str:
    """Return large figures or texts, HTML already, in rows of so many; one below the other on a narrow screen."""
    wide = f' style="--columns:{columns}"' if columns > 2 else ""
    return f'<div class="pair"{wide}>{"".join(cells)}</div>'


def page(title: str, body: Sequence[str], *, dark: str) -> str:
    """Return the whole page; `dark` are more CSS declarations for a dark ground."""
    dark_style = f"@media(prefers-color-scheme:dark){{:root{{{_DARK};{dark}}}}}"
    style = f":root{{color-scheme:light dark;{_LIGHT}}}{_CSS}{dark_style}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )
