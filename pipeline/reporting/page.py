"""The page that a report is: one HTML file that asks for nothing else, and its building blocks.

Its policy forbids every request: style and script stand in the page, the script is named by its
hash, and pictures are data. Without scripts the page shows the same, but does not sort.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from pipeline.reporting.figures import COLOURS

# in place of `COLOURS`, where the reader's screen is dark; each has 4.5 : 1 and more on it
DARK = {
    "ink": "#e7eaed", "muted": "#a3adb7", "rule": "#343b43", "skip": "#ff8a80",
    "c0": "#6cb3f2", "c1": "#f0a24e", "c2": "#68c788", "c3": "#b99bea", "c4": "#f28b82",
    "c5": "#56c5d1", "c6": "#cda183", "c7": "#e98bcb", "c8": "#c6c45a", "c9": "#a9b8c7",
}  # fmt: skip

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --soft: #f5f7f9; --mark: #8a4b00; LIGHT }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --soft: #1c2126; --mark: #f0b45e; DARK }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem }
body { margin: 0 auto; max-width: 74rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em }
h2 { margin: 3.5rem 0 .75rem; padding-top: .9rem; border-top: 2px solid var(--ink);
  font-size: 1.25rem; font-weight: 650 }
h3 { margin: 2rem 0 .5rem; font-size: 1rem; font-weight: 650 }
p { margin: .4rem 0 .9rem; max-width: 46rem }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--muted) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1.5rem; font-size: .9rem }
.muted, figcaption, caption, footer { color: var(--muted) }
figcaption, caption { font-size: .875rem; line-height: 1.45 }
.missing { padding: .6rem .9rem; border-left: 3px solid var(--rule); background: var(--soft) }
.figures { display: grid; gap: 1.75rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
figure { margin: 0; min-width: 0; break-inside: avoid }
figure > svg { display: block; width: 100%; height: auto; max-width: 36rem }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important }
.key { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0 0; padding: 0 }
.key div { min-width: 6rem }
.key dt { color: var(--muted); font-size: .875rem }
.key dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; break-inside: auto }
.scroll:focus-visible, button:focus-visible, input:focus-visible, a:focus-visible {
  outline: 2px solid var(--c0); outline-offset: 2px }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums lining-nums }
caption { text-align: left; padding-bottom: .5rem }
th, td { padding: .36rem .8rem .36rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule) }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom }
tbody th { font-weight: 500 }
tfoot :is(th, td) { border-bottom: 0; font-weight: 600 }
td.number, th.number { text-align: right; padding-left: .8rem; padding-right: .4rem;
  white-space: nowrap }
:is(td, th).number + :is(td, th):not(.number) { padding-left: 1.4rem }
.cases tbody th, .cases tfoot th { position: sticky; left: 0; background: var(--paper);
  padding-right: 1.2rem; white-space: nowrap }
.cases th.first { padding-left: 2rem } .cases td.first { padding-left: 2rem }
.cases thead tr:first-child th { border-bottom: 0; padding-bottom: 0 }
.cases tbody tr:hover > * { background: var(--soft) }
th button { all: unset; cursor: pointer; color: inherit; font-weight: 500; white-space: nowrap }
th button::after { content: "\\2195"; display: inline-block; width: 1em; text-align: right;
  opacity: .45 }
th[aria-sort] button { color: var(--ink); font-weight: 650 }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1 }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1 }
.scores:has([value=dice]:checked) :is(.hd95_mm, .nsd),
.scores:has([value=hd95_mm]:checked) :is(.dice, .nsd),
.scores:has([value=nsd]:checked) :is(.dice, .hd95_mm) { display: none }
.word { color: var(--mark); font-weight: 600; font-size: .85em }
fieldset { border: 0; margin: .75rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: 0 1.25rem; font-size: .9rem }
legend { float: left; margin-right: 1.25rem; color: var(--muted) }
label { cursor: pointer }
.case { break-inside: avoid; margin-top: 1.75rem }
.planes { display: flex; flex-wrap: wrap; gap: .5rem; max-width: 62rem; align-items: flex-start }
.planes img { display: block; width: 100%; height: auto; border-radius: 3px; background: #000 }
.planes figcaption { margin-top: .25rem }
.swatches { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; padding: 0; margin: .75rem 0;
  list-style: none; font-size: .9rem }
.swatches span { display: inline-block; width: 1.9em; height: 1.15em; margin-right: .5em;
  vertical-align: -.2em; border-radius: 2px; background: #4a4f55 }
pre { overflow-x: auto; margin: .4rem 0 1rem; padding: .8rem 1rem; background: var(--soft);
  border-radius: 4px; font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .93em }
footer { margin-top: 4rem; padding-top: .9rem; border-top: 1px solid var(--rule);
  font-size: .875rem }
@media (max-width: 36rem) { body { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.5rem }
  .planes > figure { flex-basis: 100% !important } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt } nav, fieldset { display: none }
  h2 { margin-top: 2rem } h2, h3 { break-after: avoid } tr { break-inside: avoid }
  table { font-size: 8pt } th, td { padding: .2rem .5rem .2rem 0 } .scroll { overflow: visible }
  th button, .cases tbody th { white-space: normal; position: static }
  th button::after { content: none } .figures { grid-template-columns: 1fr 1fr }
  .swatches span { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const falls = head.getAttribute("aria-sort") === "ascending";
    const key = row => row.cells[button.dataset.column].dataset.sort;
    const compare = button.dataset.kind === "text"
      ? (a, b) => a.localeCompare(b, undefined, { numeric: true })
      : (a, b) => Number(a) - Number(b);
    const rows = [...body.rows].sort((first, second) => {
      const a = key(first), b = key(second);
      if (a === "" || b === "") return (a === "") - (b === "");  // what is undefined comes last
      return falls ? compare(b, a) : compare(a, b);
    });
    for (const other of table.tHead.querySelectorAll("[aria-sort]")) {
      other.removeAttribute("aria-sort");
    }
    head.setAttribute("aria-sort", falls ? "descending" : "ascending");
    body.append(...rows);
  });
}
"""


def page(title: str, body: str) -> str:
    """The whole page.

    Args:
        title: Plain text.
        body: HTML.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    light, dark = (
        " ".join(f"--{name}: {colour};" for name, colour in colours.items())
        for colours in (COLOURS, DARK)
    )
    style = STYLE.replace("LIGHT", light).replace("DARK", dark)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser would ask for one
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def drawing(figure: Figure, alt: str, caption: str = "") -> str:
    """A figure as inline SVG, its colours those of the page, its text text."""
    content = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # ids are hashes of what is drawn and this: of two drawings in a page they differ
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    svg = content.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"\s*\n\s*", "\n", svg).strip()
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    return _figure(svg, caption)


def picture(figure: Figure, alt: str, caption: str, dpi: int = 100) -> str:
    """A figure as PNG of 128 colours, as wide beside others as it is meant to be."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(128)
    content = io.BytesIO()
    image.save(content, format="png", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    width, height = image.size
    img = f'<img src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'
    return _figure(img, caption, f' style="flex: {width} 1 {width // 2}px; max-width: {width}px"')


def _figure(content: str, caption: str, look: str = "") -> str:
    below = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{look}>{content}{below}</figure>"


def section(name: str, title: str, *parts: str) -> str:
    """A part of the page with a heading; `parts` are HTML."""
    return "\n".join([f'<section id="{name}">\n<h2>{escape(title)}</h2>', *parts, "</section>"])


def missing(sentence: str) -> str:
    """What is said where there is nothing to show."""
    return f'<p class="missing">{escape(sentence)}</p>'


def text(sentence: str) -> str:
    """A paragraph."""
    return f"<p>{escape(sentence)}</p>"


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()
) -> str:
    """A plain table of text; the first cell of a row is its heading.

    Args:
        head: Of the columns.
        rows: Their cells.
        numbers: Columns that are aligned to the right.
    """
    looks = ["" if n not in set(numbers) else ' class="number"' for n in range(len(head))]
    cells = "".join(
        f'<th scope="col"{look}>{escape(name)}</th>' for look, name in zip(looks, head, strict=True)
    )
    lines = [f"<thead><tr>{cells}</tr></thead>", "<tbody>"]
    for first, *others in rows:
        rest = "".join(
            f"<td{look}>{escape(str(cell))}</td>"
            for look, cell in zip(looks[1:], others, strict=True)
        )
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{rest}</tr>')
    return '<div class="scroll"><table>' + "\n".join([*lines, "</tbody></table></div>"])
