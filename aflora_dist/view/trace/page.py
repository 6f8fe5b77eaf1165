"""The tables as one HTML file with bars: no scripts, nothing from the web."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .analysis import WindowReport
from .tables import Cell, Sheet, compared, sheets

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --paper: #fff; --back: #f6f7f9;
  --work: #2a788e; --sent: #e8833a; --idle: #c9ced6; --bar: #d8ebef; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #2d3440; --paper: #171b22;
  --back: #0f1217; --idle: #3b4350; --bar: #1d4550; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 0 0 12px; } p { margin: 0 0 12px; }
.soft, caption { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px; margin: 20px 0;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
th, td { padding: 5px 10px; white-space: pre; } td { text-align: right; border-bottom: 1px solid var(--line); }
th.name, td.name { text-align: left; padding-left: 0; } tr:last-child td { border-bottom: 0; }
caption { caption-side: bottom; text-align: left; padding-top: 8px; font-size: 13px; }
td.part { background: linear-gradient(var(--bar), var(--bar)) no-repeat left center / var(--share) 70%; }
.steps { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 14px; align-items: center; }
.steps b { grid-column: 1 / -1; font-weight: 600; margin-top: 6px; }
.stack { display: flex; height: 18px; border-radius: 4px; overflow: hidden; }
.work { background: var(--work); } .sent { background: var(--sent); } .idle { background: var(--idle); }
.key span { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 6px 0 16px; }
.key span:first-child { margin-left: 0; }
ul { margin: 0; padding-left: 20px; } details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); }
"""


def page(title: str, windows: Sequence[WindowReport], notes: Sequence[str]) -> str:
    """A whole HTML document; ranges come for each rank, too."""
    tables = sheets(windows)
    ranks = sorted({r.rank for window in windows for r in window.ranks})
    by_rank = ""
    if len(ranks) > 1:
        each = "".join(
            f"<details><summary>Rank {rank}</summary>{''.join(map(_table, compared(windows, rank)))}</details>"
            for rank in ranks
        )
        by_rank = f"<section><h2>By rank</h2>{each}</section>"
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    steps = ", ".join(f"{w.name} ({max(r.steps for r in w.ranks)} updates)" for w in windows)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: traces</title>'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>'
        f"<h1>{escape(title)}</h1>"
        f'<p class="soft">Profiler windows {escape(steps)}; {len(ranks)} rank{"s" if len(ranks) > 1 else ""}</p>'
        f"{_stacks(windows)}"
        + "".join(f"<section>{_table(sheet)}</section>" for sheet in tables)
        + by_rank
        + (f"<section><h2>Notes</h2><ul>{said}</ul></section>" if said else "")
        + "</main></body></html>\n"
    )


def _stacks(windows: Sequence[WindowReport]) -> str:
    longest = max(r.step_ms for window in windows for r in window.ranks) or 1.0
    rows = []
    for window in windows:
        rows.append(f"<b>{escape(window.name)}</b>")
        for r in window.ranks:
            parts = "".join(
                f'<div class="{kind}" style="width:{value / longest:.2%}" title="{name}: {value:.2f} ms"></div>'
                for kind, name, value in (
                    ("work", "computing", r.computing_ms),
                    ("sent", "exposed communication", r.exposed_ms),
                    ("idle", "idle", r.idle_ms),
                )
            )
            rows.append(f'<div>rank {r.rank}</div><div class="stack">{parts}</div><div>{r.step_ms:,.1f} ms</div>')
    key = (
        '<p class="key soft"><span class="work"></span>computing<span class="sent"></span>exposed communication'
        '<span class="idle"></span>idle</p>'
    )
    return f'<section><h2>Where a step goes</h2>{key}<div class="steps">{"".join(rows)}</div></section>'


def _table(sheet: Sheet) -> str:
    def cell(i: int, c: Cell) -> str:
        if i < sheet.names:
            return f'<td class="name">{escape(c.text)}</td>'
        part = "" if c.share is None else f' class="part" style="--share:{min(max(c.share, 0), 1):.1%}"'
        return f"<td{part}>{escape(c.text)}</td>"

    head = "".join(
        f"<th class={'name' if i < sheet.names else 'number'}>{escape(column)}</th>"
        for i, column in enumerate(sheet.columns)
    )
    rows = "".join(f"<tr>{''.join(cell(i, c) for i, c in enumerate(row))}</tr>" for row in sheet.rows)
    caption = f"<caption>{escape(sheet.note)}</caption>" if sheet.note else ""
    return f"<h2>{escape(sheet.title)}</h2><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
