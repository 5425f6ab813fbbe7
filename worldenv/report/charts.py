"""Charts of the report: drawn by matplotlib, returned as `<svg>` strings to stand inside the page.

They scale to the width they are given. Text stays text and takes the page's font, colours become
the page's variables and so follow its dark mode; a title and a description of the data are there
for those who cannot see them. The same data give the same bytes.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from worldenv.runtime import places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page's variables; these values (its light ones) only pass through matplotlib. Any two of
# COLOURS are 16 or more apart in L*a*b*, for dichromats too (Machado et al., IEEE TVCG 15, 2009).
PALETTE = {
    "ink": "#1c2128",
    "muted": "#69707c",
    "rule": "#e6e3de",
    "accent": "#0f766e",
    "second": "#c2612c",
    "before": "#8b93a0",
    "third": "#6d5bae",
}
COLOURS = ("accent", "second", "before", "third")
MARKERS = dict(zip(COLOURS, "os^D", strict=True))  # not by colour alone
_WIDTH, _WIDE = 300, 500  # about as wide as the page shows them, so that text keeps its size
_STYLE = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": PALETTE["rule"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.formatter.useoffset": False,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["rule"],
    "xtick.color": PALETTE["rule"],
    "ytick.color": PALETTE["rule"],
    "xtick.labelcolor": PALETTE["muted"],
    "ytick.labelcolor": PALETTE["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.color": PALETTE["ink"],
    "font.size": 11,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.1,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart; x and y of equal length, non-finite points are left out. colour: one of
    COLOURS. band: (low, high) of each y, drawn behind it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str | None = None
    dashed: bool = False
    band: Sequence[tuple[float, float]] = ()


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "step",
    *,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    percent: bool = False,
    from_zero: bool = False,
    height: int = 190,
) -> str:
    """Lines over x with a legend when there are several; the y axis is logarithmic for wide
    positive data.
    """
    drawn = [(s, *_points(s)) for s in series]
    drawn = [d for d in drawn if len(d[1])]
    if not drawn:
        return '<p class="absent">No values were logged.</p>'
    every_y = np.concatenate([y for _, _, y in drawn])
    least, most = float(every_y.min()), float(every_y.max())
    log = not (percent or from_zero or y_range) and least > 0 and most > 30 * least

    def paint(axes: Axes) -> None:
        for number, (line, x, y) in enumerate(drawn):
            colour = line.colour or COLOURS[number % len(COLOURS)]
            axes.plot(
                x,
                np.clip(y, *y_range) if y_range else y,
                clip_on=False,
                label=line.name,
                color=PALETTE[colour],
                linestyle="--" if line.dashed else "-",
                marker=MARKERS[colour] if len(x) <= 24 and not line.dashed else "",
            )
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(line.x, low, high, color=PALETTE[colour], alpha=0.18, linewidth=0)
        axes.set_xlabel(x_label)
        axes.margins(x=0.02, y=0.06)
        axes.locator_params(axis="x", nbins=5, integer=x_range is None)
        if log:
            axes.set_yscale("log", subs=[3] if most < 300 * least else [])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        else:
            axes.locator_params(axis="y", nbins=4)
            if most - least < 1e-4 * abs(most):  # a constant's rounding is no curve
                axes.set_ylim(least - 0.1 * abs(most), most + 0.1 * abs(most))
            # An axis that nearly reaches zero should show it.
            if least >= 0 and (from_zero or least < 0.35 * most):
                axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        axes.set(**{k: v for k, v in (("xlim", x_range), ("ylim", y_range)) if v})
        if len(drawn) > 1:
            wide = sum(34 + 7 * len(line.name) for line, _, _ in drawn) > _WIDTH
            axes.figure.legend(loc="outside upper left", ncols=2 if wide else len(drawn))

    said = "{:.0%}" if percent else "{:.3g}"
    described = "; ".join(
        f"{line.name}: {said.format(y[0])} at {x_label} {x[0]:g}"
        + (f" to {said.format(y[-1])} at {x[-1]:g}" if len(x) > 1 else "")
        for line, x, y in drawn
    )
    return _draw(title, described, (_WIDTH, height), paint)


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """Rates with intervals on a 0..100% scale: rows of (name, rate, low, high, colour)."""

    def paint(axes: Axes) -> None:
        for number, (name, rate, low, high, colour) in enumerate(rows):
            axes.barh(-number, rate, height=0.18, color=PALETTE[colour], alpha=0.35)
            axes.plot([low, high], [-number] * 2, color=PALETTE[colour], linewidth=2)
            axes.plot(rate, -number, "o", color=PALETTE[colour], markersize=10, clip_on=False)
            axes.text(0, 0.26 - number, name, size=13, weight="bold")
        axes.set(xlim=(0, 1), ylim=(0.3 - len(rows), 0.65), yticks=[])
        axes.set_xticks(np.linspace(0, 1, 5), ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(True, axis="x")
        axes.spines.bottom.set_visible(False)
        axes.tick_params(axis="x", length=0)

    described = "; ".join(
        f"{name}: {rate:.0%} ({low:.0%} to {high:.0%})" for name, rate, low, high, _ in rows
    )
    return _draw(title, described, (_WIDE, 48 * len(rows) + 26), paint)


def bar(share: float, colour: str = "accent") -> str:
    """A bar for a table cell, `share` of its width in 0..1; colour: a name of PALETTE."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<span class="bar"><span style="width:{width:.1f}%;background:var(--{colour})">'
        "</span></span>"
    )


def _draw(
    title: str, description: str, size: tuple[int, int], paint: Callable[[Axes], None]
) -> str:
    with drawing(*size, **{"svg.hashsalt": title}) as figure:
        paint(figure.subplots())
        return _inline(as_svg(figure), title, description, size)


def as_svg(figure: Figure, **about: str) -> str:
    """The file of a figure; about: "Title" and "Description" for those who cannot see it."""
    with io.StringIO() as file:
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing | about)
        return file.getvalue()


@contextmanager
def drawing(width: int, height: int, **settings: object) -> Iterator[Figure]:
    """A figure of so many pixels (at 72 an inch) in the report's style; settings: of matplotlib."""
    # Loaded when a page is drawn: no command should wait for it at its start. It writes a cache.
    os.environ.update(places.library_environment(os.environ))
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user's says
        matplotlib.rcParams.update(_STYLE | settings)
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def _inline(svg: str, title: str, description: str, size: tuple[int, int]) -> str:
    """A file of matplotlib's as a part of the page: without header, own fonts, colours and ids."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", _plain_tag, body)
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body.rstrip()}"
    )


def _plain_tag(match: re.Match) -> str:
    tag = match[0].replace("xlink:href", "href")
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    # Before matplotlib 3.11 "font: 11px 'DejaVu Sans'", since "font-size: 11px; font-family: ...".
    tag = re.sub(r"font-family: [^;\"]*; ", "", tag)
    tag = re.sub(r"font: (bold|700|) ?([\d.]+px) [^;\"]*", r"font-size: \2", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", tag)
    for name, value in PALETTE.items():
        tag = tag.replace(value, f"var(--{name})")
    return tag


def _points(series: Series, most: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Finite points, averaged into at most `most` buckets."""
    x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return x, y
    buckets = np.array_split(np.arange(len(x)), most)
    return np.array([x[b].mean() for b in buckets]), np.array([y[b].mean() for b in buckets])
