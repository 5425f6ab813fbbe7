"""What a report is made of: the page's frame and style sheet (light and dark), tiles, and number
formats.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from worldenv.report.statistics import Interval

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>worldenv report</title>
<style>
:root {
  --paper: #faf9f7; --card: #ffffff; --ink: #1c2128; --muted: #69707c; --rule: #e6e3de;
  --accent: #0f766e; --second: #c2612c; --before: #8b93a0; --third: #6d5bae;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e8eaed; --muted: #98a0ac; --rule: #2c323a;
    --accent: #3fb8a9; --second: #e08a57; --before: #6b7482; --third: #a596e0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 80px; }
header { margin-bottom: 24px; }
.eyebrow { color: var(--muted); font-size: 14px; letter-spacing: .02em; margin: 0 0 8px; }
h1 {
  font-size: clamp(56px, 13vw, 112px); line-height: 1; letter-spacing: -.045em; font-weight: 650;
  margin: 0 0 20px;
}
h1 i { font-style: normal; font-weight: 300; color: var(--before); font-size: .72em; }
h1 b { font-weight: inherit; }
h1 .before { color: var(--before); }
h1 .after { color: var(--accent); }
.lead { font-size: 20px; line-height: 1.4; max-width: 36em; margin: 0 0 16px; }
header p { max-width: 44em; color: var(--muted); margin: 0 0 8px; }
header p.lead, header p.verdict { color: var(--ink); }
section { padding-top: 28px; margin-top: 36px; border-top: 1px solid var(--rule); }
h2 { font-size: 22px; letter-spacing: -.015em; font-weight: 620; margin: 0 0 18px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
figure {
  margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px;
  min-width: 0;
}
figure.wide { max-width: 560px; margin: 24px 0 20px; }
figcaption { color: var(--muted); font-size: 13.5px; line-height: 1.45; margin-top: 8px; }
figcaption strong { color: var(--ink); font-weight: 600; }
.grid-of-charts {
  display: grid;
  gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
}
.media { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
.media figure { max-width: 500px; }
.media video, .media img { width: 100%; display: block; border-radius: 4px; background: #fff; }
svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
.scroll {
  overflow-x: auto;
  background: var(--card);
  border: 1px solid var(--rule);
  border-radius: 10px;
}
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--muted); }
th, td {
  padding: 10px 14px;
  border-bottom: 1px solid var(--rule);
  white-space: nowrap;
  vertical-align: top;
}
tr:last-child > * { border-bottom: 0; }
td.details { white-space: normal; min-width: 16em; }
td.name { white-space: normal; min-width: 13em; }
small { color: var(--muted); font-size: 12.5px; }
.bar {
  display: block;
  height: 4px;
  min-width: 96px;
  border-radius: 2px;
  background: var(--rule);
  margin-top: 6px;
}
.bar span { display: block; height: 100%; border-radius: 2px; }
.tiles { display: flex; flex-wrap: wrap; gap: 16px 48px; margin: 0 0 20px; }
.tiles span, .tiles small { display: block; }
.tiles span { font-size: 13px; color: var(--muted); }
.tiles b { font-size: 30px; font-weight: 620; letter-spacing: -.02em; line-height: 1.25; }
dl {
  display: grid;
  grid-template-columns: max-content 1fr;
  gap: 4px 24px;
  margin: 20px 0 0;
  font-size: 14.5px;
}
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.absent { color: var(--muted); font-style: italic; margin: 0; }
@media (max-width: 560px) {
  main { padding: 32px 16px 56px; }
  th, td { padding: 8px 10px; }
  td.name { min-width: 9em; }
  .bar { min-width: 64px; }
}
</style>
</head>
<body>
<main>
{{body}}
</main>
</body>
</html>
"""


def tiles(entries: Sequence[tuple[str, str | None, str]]) -> str:
    """Numbers in a row: (label, value, note); those without a value are left out."""
    cells = [
        f"<div><span>{label}</span><b>{value}</b><small>{note}</small></div>"
        for label, value, note in entries
        if value is not None
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def figure(title: str, chart: str) -> str:
    """A titled chart."""
    return f"<figure><h3>{text(title)}</h3>{chart}</figure>"


def absent(what: str) -> str:
    """The sentence for something this run has not produced."""
    return f'<p class="absent">The {what} has not run in this folder.</p>'


def text(value: object) -> str:
    """Any value as safe HTML text."""
    return escape(str(value))


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: object) -> str:
    """A short text for a number or string."""
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def points(share: float) -> str:
    """A difference of shares in percentage points, with sign."""
    return f"{100 * share:+.0f}".replace("-", "−")


def span(interval: Interval) -> str:
    """An interval's bounds in percentage points."""
    return f"{points(interval.low)} to {points(interval.high)}"


def p_value(p: float) -> str:
    """A p-value with two digits."""
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}".replace("e-0", "e-")


def percent(value: object) -> str | None:
    """A share as a percentage, None where there is none."""
    return f"{value:.0%}" if is_number(value) else None


def signed_percent(value: object) -> str | None:
    """A difference of shares with its unit, None where there is none."""
    return f"{points(value)} points" if is_number(value) else None


def decimal(value: object) -> str | None:
    """Three decimals, None where there is no number."""
    return f"{value:.3f}" if is_number(value) else None


def duration(seconds: float) -> str:
    """Seconds as minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where the page is wide enough."""
    return f'<div class="grid-of-charts">{"".join(figures)}</div>'


def embedded(path: Path) -> str:
    """A file as a data URL."""
    kind = {"mp4": "video/mp4", "png": "image/png"}[path.suffix[1:]]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
