"""The README's figures, as SVG: the same data give the same bytes, and each describes its data."""

from collections.abc import Sequence
from pathlib import Path

from bench.results.runs import Trained, gain, groups, over_seeds, trained
from worldenv.report.charts import PALETTE, as_svg, drawing
from worldenv.report.statistics import Interval

TITLE = "Success after post-training minus success of imitation, in points"
Row = tuple[str, Interval | None, str]  # what stands beside it (a heading has no interval), colour


def rows(results: Path) -> list[Row]:
    """Every run of the default and their mean, then every earlier one, in groups."""
    found: list[Row] = []
    for below, colour in (("default", "accent"), ("earlier", "before")):
        for name, runs in groups(trained(results, below)).items():
            if len(runs) == 1:
                label = f"{name.removeprefix('earlier/')}, {_label(runs[0])}"
                found.append((label, runs[0].difference, colour))
                continue
            found.append((f"results/{name}", None, "ink"))
            found += [(_label(run), run.difference, colour) for run in runs]
            if (mean := over_seeds(runs)) is not None:
                found.append((f"mean of {len(runs)} seeds", mean, "ink"))
    return [
        (name, change, "second" if change and change.mean < 0 else colour)
        for name, change, colour in found
    ]


def _label(run: Trained) -> str:
    return f"seed {run.seed}: {run.successes(0)} → {run.successes(1)} of {len(run.pairs)}"


def described(shown: Sequence[Row]) -> str:
    """The figure's data in words."""
    said = (name if change is None else f"{name}, {gain(change)}" for name, change, _ in shown)
    return "; ".join(said).replace("*", "")


def differences(results: Path) -> str:
    """The forest plot of all runs of one task, as the text of an SVG."""
    shown = rows(results)
    height = 17 * len(shown) + 48
    style = {"svg.hashsalt": TITLE, "figure.facecolor": "white", "font.size": 9}
    with drawing(640, height, **style) as figure:
        axes = figure.subplots()
        for number, (_, change, colour) in enumerate(shown):
            if change is not None:
                ends = [100 * change.low, 100 * change.high]
                axes.plot(ends, [-number] * 2, color=PALETTE[colour], linewidth=1.6)
                axes.plot(100 * change.mean, -number, "o", color=PALETTE[colour], markersize=5)
        axes.axvline(0, color=PALETTE["muted"], linewidth=1)
        axes.set_yticks([-n for n in range(len(shown))], [name for name, _, _ in shown])
        for label, (_, change, _) in zip(axes.get_yticklabels(), shown, strict=True):
            label.set_color(PALETTE["muted" if change else "ink"])
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.set(ylim=(0.7 - len(shown), 0.7), xlabel=TITLE)
        return as_svg(figure, Title=TITLE, Description=described(shown))
