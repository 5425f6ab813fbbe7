"""Small SVG charts, drawn by hand so that they follow the page's fonts, colours and dark mode.

Each function returns an `<svg>` string with a 360-unit wide view box, so that text stays readable
where a chart fills a phone's width. Colours are CSS variables of the page (`--accent`, `--before`,
`--second`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

COLOURS = ("var(--accent)", "var(--second)", "var(--before)", "var(--third)")
WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 12, 12, 34


@dataclass(frozen=True)
class Series:
    """One line of a chart; x and y of equal length, non-finite points are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str | None = None
    dashed: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str = "step",
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    percent: bool = False,
    from_zero: bool = False,
    height: int = 220,
) -> str:
    """Lines over x with a legend when there are several; the y axis is logarithmic for wide
    positive data.
    """
    drawn = [(s, *_points(s)) for s in series]
    drawn = [d for d in drawn if len(d[1])]
    if not drawn:
        return '<p class="absent">No values were logged.</p>'
    every_x = np.concatenate([x for _, x, _ in drawn])
    every_y = np.concatenate([y for _, _, y in drawn])
    linear = percent or from_zero or y_range is not None
    log = not linear and every_y.min() > 0 and every_y.max() > 30 * every_y.min()
    transform = np.log10 if log else np.asarray
    low, high = (float(transform(v)) for v in (y_range or _padded(every_y, log, from_zero)))
    left, right = x_range or (float(every_x.min()), float(every_x.max()))
    if right == left:
        left, right = left - 0.5, right + 0.5
    legend = 18 if len(drawn) > 1 else 0
    top, bottom = _TOP + legend, height - _BOTTOM

    def place(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        across = _LEFT + (np.asarray(x) - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        return across, bottom - (transform(y) - low) / (high - low) * (bottom - top)

    parts = [_open(height, y_label or ", ".join(s.name for s, _, _ in drawn))]
    for tick in _log_ticks(low, high) if log else _ticks(low, high, 4):
        y = float(place(np.array([left]), np.array([tick]))[1][0])
        label = f"{tick:.0%}" if percent else _short(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(left, right, 5):
        x = float(place(np.array([tick]), np.array([10**low if log else low]))[0][0])
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_short(tick)}</text>'
        )
    parts.append(
        f'<text class="label" x="{(WIDTH + _LEFT - _RIGHT) / 2}" y="{height - 3}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    cursor = float(_LEFT)
    for number, (line, x, y) in enumerate(drawn):
        colour = line.colour or COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        across, down = place(x, np.clip(y, *y_range) if y_range else y)
        path = " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))
        parts.append(f'<polyline class="line" points="{path}" style="stroke:{colour}"{dash}/>')
        if len(x) <= 24 and not line.dashed:
            parts += [
                f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2.2" style="fill:{colour}"/>'
                for a, d in zip(across, down, strict=True)
            ]
        if legend:
            parts.append(
                f'<line class="line" x1="{cursor:.0f}" x2="{cursor + 14:.0f}" y1="{_TOP}" '
                f'y2="{_TOP}" style="stroke:{colour}"{dash}/>'
                f'<text class="label" x="{cursor + 19:.0f}" y="{_TOP + 3.5}">'
                f"{escape(line.name)}</text>"
            )
            cursor += 34 + 6.4 * len(line.name)
    return "".join([*parts, "</svg>"])


def interval_chart(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Rates with intervals on a 0..100% scale: rows of (name, rate, low, high, colour)."""
    step, left, right = 44, 12, 14
    height = step * len(rows) + 26
    parts = [_open(height, "success rates with 95% intervals")]

    def place(rate: float) -> float:
        return left + rate * (WIDTH - left - right)

    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = place(tick)
        anchor = "start" if tick == 0 else "end" if tick == 1 else "middle"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 20}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{tick:.0%}</text>')
    for number, (name, rate, low, high, colour) in enumerate(rows):
        y = step * number + 32
        parts.append(f'<text class="name" x="{left}" y="{y - 12}">{escape(name)}</text>')
        parts.append(
            f'<rect x="{place(0):.1f}" y="{y - 4}" width="{place(rate) - place(0):.1f}" height="8" '
            f'rx="2" style="fill:{colour};opacity:.35"/>'
            f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}" '
            f'style="stroke:{colour};stroke-width:2"/>'
            f'<circle cx="{place(rate):.1f}" cy="{y}" r="5" style="fill:{colour}"/>'
        )
    return "".join([*parts, "</svg>"])


def bar(share: float, colour: str = "var(--accent)") -> str:
    """A bar for a table cell, `share` of its width in 0..1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<span class="bar"><span style="width:{width:.1f}%;background:{colour}"></span></span>'


def _open(height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    )


def _points(series: Series, most: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Finite points, averaged into at most `most` buckets."""
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return x, y
    buckets = np.array_split(np.arange(len(x)), most)
    return np.array([x[b].mean() for b in buckets]), np.array([y[b].mean() for b in buckets])


def _padded(values: np.ndarray, log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.2, high * 1.2
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    margin = 0.06 * (high - low)
    # An axis that nearly reaches zero should show it.
    near = low >= 0 and (from_zero or low < 0.35 * high)
    floor = 0.0 if near else low - margin
    return floor, high + margin


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high]."""
    raw = (high - low) / about
    scale = 10 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the exponents [low, high], and halves of them where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5) if high - low < 1.6 else (1, 3)
    ticks = [f * 10.0**p for p in powers for f in factors]
    return [t for t in ticks if low <= math.log10(t) <= high]


def _short(value: float) -> str:
    """A number in few characters: 1500 -> 1.5k, 0.00012 -> 1.2e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e3:
        return f"{value / 1e3:.4g}k"
    if 0 < size < 1e-3:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.4g}"
