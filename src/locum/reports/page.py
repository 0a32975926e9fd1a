"""The page around a report: its style for light, dark, phone and paper, its few lines of script, and its frame.

The page must stand alone: no request leaves it, which the content security policy in its head also forbids.
Colours of marks are chosen to differ for colour-blind readers too, in lightness as well as in hue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .charts import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

LIGHT = """
--paper:#fff;--soft:#f5f6f8;--ink:#16191d;--dim:#59616b;--rule:#c3c9d1;--grid:#e6e9ee;--accent:#0b5cad;
--c0:#0072b2;--c1:#c8500a;--c2:#00805c;--c3:#b0528f;--c4:#8a6a00;--c5:#3c93c9;--c6:#6b45a8;--c7:#a3343c;--co:#30363d;
--u0:#fff;--u1:#2c5f9e;--u2:#6f9bcb;--u3:#a9c6e3;--u4:#dbe7f3;--u5:#fbe3cf;--u6:#f5b98a;--u7:#e2813f;--u8:#a8480f;
--b0:#f2b56b;--b1:#8cc7e8;--b2:#a6d59a;--b3:#e8a6cc;--b4:#e8d95f;--b5:#bcaee6;--b6:#7fd1c4;--b7:#eb9a90;
--fk:#3f5873;--fr:#cfd8e3;--fc:#cde3d3;--fn:#fff;--fd:#e9ebee;--sign:#16191d;
"""
DARK = """
--paper:#14171b;--soft:#1d2126;--ink:#e8eaed;--dim:#a3abb5;--rule:#4b535d;--grid:#2b3037;--accent:#79b8ff;
--c0:#58b1ee;--c1:#ff9455;--c2:#3fc79a;--c3:#e88fc8;--c4:#d9b74a;--c5:#9fd8ff;--c6:#b79bf0;--c7:#f58a8f;--co:#d5d9de;
--u0:#14171b;--u1:#5fa4f0;--u2:#3f77b5;--u3:#2e5480;--u4:#263a50;--u5:#4b3727;--u6:#84512a;--u7:#c6742f;--u8:#ffb067;
--b0:#b97a2c;--b1:#3d86ad;--b2:#55934a;--b3:#a85f8c;--b4:#94862a;--b5:#7666b5;--b6:#2f8d7f;--b7:#b45f56;
--fk:#9fb6cf;--fr:#3b4654;--fc:#35513d;--fn:#14171b;--fd:#2b3037;--sign:#f2f4f6;
"""

STYLE = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 16px 56px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.2rem;margin:44px 0 4px}h3{font-size:1rem;margin:22px 0 4px}
p{margin:6px 0;max-width:76ch}.dim,figcaption,.legend{color:var(--dim);font-size:.9rem}a{color:var(--accent)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,225px),1fr));gap:12px;margin:18px 0 12px}
.figures div{background:var(--soft);border-radius:10px;padding:12px 16px}
.figures b{display:block;font-size:1.4rem;line-height:1.3;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.figures span{display:block;color:var(--dim);font-size:.88rem;line-height:1.35;overflow-wrap:anywhere}
.lead{font-size:1.08rem;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:12px 40px;align-items:start}
.pair>figure{max-width:540px}.tight{row-gap:0}.hint{display:none}
figure{margin:10px 0;min-width:0}figcaption{margin-top:4px;max-width:76ch}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
svg{display:block;width:100%;height:auto;font-size:12px}svg.natural{max-width:none}
svg text{fill:var(--ink)}svg .tick{fill:var(--dim);font-size:11.5px;font-variant-numeric:tabular-nums}
svg .axis{fill:var(--dim)}svg .group,svg .name{font-weight:600}
.grid{stroke:var(--grid)}.rule{stroke:var(--rule)}.reference{stroke:var(--ink);stroke-dasharray:2 2;opacity:.75}
.interval{stroke:var(--ink);stroke-width:1.3}.whisker{stroke-width:1.5}.leader{stroke-width:.8;opacity:.7}
.arrow{stroke-width:1.4;stroke-dasharray:2 3;opacity:.8}.mark{stroke:var(--paper);stroke-width:1.2}.seed{opacity:.75}
.curve{fill:none!important;stroke-width:2;stroke-linejoin:round}.curve.raw{stroke-width:1;opacity:.3}.curve.thin{stroke-width:1.2}
.hit{fill:transparent}.hit:hover{stroke:var(--ink);stroke-width:1}
.cell text{font-size:9.5px;font-weight:600;text-anchor:middle;fill:var(--sign)}.cell rect{stroke:none}
.cell .fn,.cell .fd,.u0{stroke:var(--rule);stroke-width:.6}.cell:hover rect{stroke:var(--ink);stroke-width:1.5}
.legend{max-width:none}.legend span{display:inline-block;margin-right:16px}
.key{display:inline-block;width:15px;height:15px;margin-right:5px;vertical-align:-2px;text-align:center;border:1px solid var(--rule);
font:600 10px/13px system-ui,"Liberation Sans",Arial,sans-serif;color:var(--sign)}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 10px;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
td.n,th.n{text-align:right}td.wrap{white-space:normal;overflow-wrap:anywhere;}th{color:var(--dim);font-weight:600}
thead th{border-bottom-color:var(--rule)}th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
.models th,.models td{padding:5px 6px}.models td:first-child{white-space:normal;padding-left:2px}.facts th{width:190px;white-space:normal;vertical-align:top}
@media (max-width:620px){.hint{display:block}.models table{font-size:.78rem}.models th,.models td{padding:5px 4px}.models th{white-space:normal;vertical-align:bottom}.facts th{width:110px}}
tr.best td:first-child{font-weight:650}summary{cursor:pointer;color:var(--accent);margin:8px 0}
.press{font:inherit;font-size:.88rem;color:var(--accent);background:none;border:1px solid var(--rule);border-radius:6px;padding:2px 10px;cursor:pointer}
@media print{main{max-width:none;padding:0}figure,.figures div,tr{break-inside:avoid}.scroll{overflow:visible}svg.natural{max-width:100%}
.press{display:none}h2{break-after:avoid}body{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

# the tables sort and the cells of a plan change order; everything can be read without it
SCRIPT = """
for (const table of document.querySelectorAll('table.sort')) {
  table.querySelectorAll('thead th').forEach((head, column) => {
    const press = document.createElement('button');
    press.textContent = head.textContent;
    head.replaceChildren(press);
    press.addEventListener('click', () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (up ? 1 : -1) * key(a).localeCompare(key(b), 'en', {numeric: false}));
      if (head.className === 'n') rows.sort((a, b) => (up ? 1 : -1) * (parseFloat(key(a)) - parseFloat(key(b)) || 0));
      table.tBodies[0].append(...rows);
    });
  });
}
for (const press of document.querySelectorAll('.press')) {
  press.hidden = false;
  press.addEventListener('click', () => {
    const own = press.getAttribute('aria-pressed') !== 'true';
    press.setAttribute('aria-pressed', own);
    press.textContent = own ? 'group by fate' : 'order by expert number';
    for (const cell of press.closest('figure').querySelectorAll('.cell')) {
      const now = cell.getAttribute('transform');
      cell.setAttribute('transform', 'translate(' + cell.dataset.own + ')');
      cell.dataset.own = now.slice(10, -1);
    }
  });
}
"""


def _classes() -> str:
    """One rule per colour: fill for marks and cells, stroke for lines, ink for names in the colour."""
    named = [f"c{n}" for n in range(8)] + ["co"]
    rules = [
        f".{c}{{fill:var(--{c})}}line.{c},.curve.{c}{{stroke:var(--{c})}}svg text.{c}{{fill:var(--{c})}}" for c in named
    ]
    cells = [f"u{n}" for n in range(9)] + [f"b{n}" for n in range(8)] + ["fk", "fr", "fc", "fn", "fd"]
    rules += [f".{c}{{fill:var(--{c});background:var(--{c})}}" for c in cells]
    return "".join(rules)


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    colours = (
        f":root{{color-scheme:light dark;{LIGHT}}}@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="Locum">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{colours}{STYLE}{_classes()}</style>
</head>
<body>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def section(name: str, heading: str, *parts: str) -> str:
    return f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n' + "\n".join(parts) + "\n</section>"


def figure(drawing: str, caption: str = "", scroll: bool = False) -> str:
    drawing = f'<div class="scroll" tabindex="0">{drawing}</div>' if scroll else drawing
    return f"<figure>{drawing}" + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "") + "</figure>"


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str | tuple[str, float | None]]], best: int | None = None
) -> str:
    """A sortable table. A cell that is a pair holds what is shown and the number to sort by, and stands right."""
    numeric = [any(isinstance(row[i], tuple) for row in rows) for i in range(len(heads))]
    head = "".join(
        f'<th class="n">{escape(h)}</th>' if n else f"<th>{escape(h)}</th>" for h, n in zip(heads, numeric, strict=True)
    )
    lines = []
    for number, row in enumerate(rows):
        style = ' class="best"' if number == best else ""
        lines.append(f"<tr{style}>{''.join(map(_cell, row))}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll" tabindex="0"><table class="sort"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(cell: str | tuple[str, float | None]) -> str:
    if isinstance(cell, str):
        return f"<td>{escape(cell)}</td>"
    shown, value = cell
    return f'<td class="n" data-v="{value if value is not None and math.isfinite(value) else -1e308!r}">{escape(shown)}</td>'
