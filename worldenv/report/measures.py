"""What `worldenv-eval --simulator` measured, to look at: curves with their intervals, and strips of
film, real over imagined. Both are PNG files in the run folder, which the report shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldenv.report.charts import COLOURS, MARKERS, PALETTE, drawing
from worldenv.report.parts import embedded, text, tiles
from worldenv.report.statistics import wilson
from worldenv.runtime.errors import write_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FRAMES = (0, 1, 2, 4, 8, 12, 16)
_SCALE, _BAR = 2, 22  # pixels a pixel, pixels of a line of text


def draw(measured: dict[str, Any], path: Path) -> None:
    """Six panels of a trial's figures as a PNG; bands and bars are 95% intervals."""
    paints = (_pixels, _hand, _drift, _things, _events, _policies)
    titles = (
        "PSNR, dB (dotted: a still picture, moving pixels)",
        "End-effector error, cm",
        "Nothing done: PSNR to the first frame, dB",
        "Things lost (vanished or jumped), share of episodes",
        "Agreement at the event (dotted: on real frames)",
        "Success of policies, imagined over real",
    )
    with drawing(1080, 640, **{"font.size": 10}) as figure:
        figure.set_facecolor("white")
        for axes, title, paint in zip(figure.subplots(2, 3).flat, titles, paints, strict=True):
            axes.set_title(title, loc="left", fontsize=11, weight="bold")
            paint(axes, measured)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(fontsize=9)
        _save(path, lambda: figure.savefig(path, format="png", dpi=110))


def film(shown: Sequence[tuple[str, np.ndarray, np.ndarray]], path: Path) -> None:
    """Strips as a PNG: (caption, real, imagined) frames [F, V, H, W, 3] uint8 of each episode, by
    chunks since the first frame."""
    strips = [_strip(name, np.asarray(real), np.asarray(made)) for name, real, made in shown]
    width = max(s.shape[1] for s in strips)
    padded = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255)
              for s in strips]  # fmt: skip
    _save(path, lambda: Image.fromarray(np.concatenate(padded)).save(path))


def sections(folder: Path) -> list[tuple[str, str]]:
    """Sections of the report, (title, HTML): one for each round that was tried."""
    found = []
    for path in sorted(folder.glob("simulator-*.json")):
        measured = json.loads(path.read_text())
        number = measured["round"]
        pictures = [folder / f"{name}-{number}.png" for name in ("simulator", "film")]
        figures = [
            f'<figure class="wide"><img style="width:100%" src="{embedded(p)}" alt="{p.stem}">'
            "</figure>"
            for p in pictures
            if p.exists()
        ]
        title = f"The world of round {number} on {measured['episodes']['n']} fresh episodes"
        found.append((text(title), _numbers(measured) + "".join(figures)))
    return found


def _numbers(measured: dict[str, Any]) -> str:
    event, gaps = measured["event"], measured["closed_loop"]
    entries = [
        ("Grasps agree", _share(event["grasp"].get("1", {})), "one chunk before"),
        ("Placings agree", _share(event["placing"].get("1", {})), "one chunk before"),
        *(
            (f"Gap, {name.replace('_', ' ')}", _share(gap["difference"]), "imagined minus real")
            for name, gap in gaps.items()
        ),
        *(
            (f"Gain, {where}", _share(figure), f"of post-training, acting {acting}")
            for acting, worlds in measured.get("gain", {}).items()  # older records have none
            for where, figure in worlds.items()
        ),
    ]
    return tiles(entries)


def _share(figure: dict[str, Any]) -> str | None:
    if figure.get("value") is None:
        return None
    value, low, high = (round(100 * figure[k]) for k in ("value", "low", "high"))
    return f"{value}% <small>{low} to {high}, n = {figure['n']}</small>"


# ---------------------------------------------------------------- panels


def _line(axes: Axes, figures: dict[str, Any], name: str, colour: str, style: str = "-") -> None:
    """A figure by horizon or lead as a line with its band; dotted ones are there to compare with,
    and have neither band nor name."""
    rows = [(int(k), v) for k, v in figures.items() if v.get("value") is not None]
    x, y = [k for k, _ in rows], [v["value"] for _, v in rows]
    if style == ":":
        axes.plot(x, y, style, color=PALETTE[colour])
        return
    marker = MARKERS[colour] if len(x) <= 8 else ""
    axes.plot(x, y, style, color=PALETTE[colour], marker=marker, label=name)
    sure = [(k, v["low"], v["high"]) for k, v in rows if v.get("low") is not None]
    if sure:
        axes.fill_between(*zip(*sure, strict=True), color=PALETTE[colour], alpha=0.18, linewidth=0)


def _pixels(axes: Axes, measured: dict[str, Any]) -> None:
    psnr = measured["psnr"]
    for colour, view in zip(COLOURS, psnr["all"], strict=False):
        _line(axes, psnr["all"][view], f"{view}, all", colour)
        _line(axes, psnr["moving"][view], f"{view}, moving", colour, "--")
        _line(axes, psnr["moving_copy"][view], "", colour, ":")
    axes.set_xlabel("chunks ahead")


def _hand(axes: Axes, measured: dict[str, Any]) -> None:
    _line(axes, measured["hand_error_cm"], "hand", "accent")
    axes.set(xlabel="chunks ahead", ylim=(0, None))


def _drift(axes: Axes, measured: dict[str, Any]) -> None:
    _line(axes, measured["drift_psnr"], "drift", "accent")
    axes.set_xlabel("chunks without motion")


def _things(axes: Axes, measured: dict[str, Any]) -> None:
    for task, things in measured["things"].items():
        rows = [(n, kinds) for n, kinds in things.items() if n != "painted_over"]
        for colour, (name, kinds) in zip(COLOURS, rows, strict=False):
            label = name.split("_", 2)[-1].replace("_", " ")
            label = label if len(measured["things"]) == 1 else f"{task}: {label}"
            for kind, style in (("imagined", "-"), ("on_real", ":")):
                gone, moved = kinds[kind]["vanished"], kinds[kind]["jumped"]
                lost = {h: _either(gone[h], moved[h]) for h in gone if gone[h]["n"]}
                _line(axes, lost, label, colour, style)
    axes.set(xlabel="chunks ahead", ylim=(0, None))


def _either(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The share of two that exclude each other, with its interval."""
    value, n = one["value"] + other["value"], one["n"]
    return {"value": value, **vars(wilson(round(value * n), n))}


def _events(axes: Axes, measured: dict[str, Any]) -> None:
    for colour, (name, leads) in zip(COLOURS, measured["event"].items(), strict=False):
        _line(axes, leads, name, colour)
        _line(axes, {k: v["on_real"] for k, v in leads.items()}, "", colour, ":")
    axes.set(xlabel="chunks before it", ylim=(0, 1.02), xticks=[1, 2, 3, 4])


def _policies(axes: Axes, measured: dict[str, Any]) -> None:
    ranking = measured["ranking"]
    for gap in ranking["policies"].values():
        x, y = gap["real"], gap["imagined"]
        colour = PALETTE["accent"]
        axes.plot(x["value"], y["value"], "o", color=colour, markersize=6)
        axes.plot([x["low"], x["high"]], [y["value"]] * 2, color=colour, alpha=0.3, linewidth=1)
        axes.plot([x["value"]] * 2, [y["low"], y["high"]], color=colour, alpha=0.3, linewidth=1)
    axes.plot([0, 1], [0, 1], "--", color=PALETTE["before"], linewidth=1)
    said = [
        f"{k} {ranking[k]['value']:.2f}"
        for k in ("pearson", "spearman")
        if ranking.get(k, {}).get("value") is not None
    ]
    axes.text(0.02, 0.94, ", ".join(said), color=PALETTE["muted"], transform=axes.transAxes)
    axes.set(xlabel="real", ylabel="imagined", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


# ---------------------------------------------------------------- film


def _strip(name: str, real: np.ndarray, imagined: np.ndarray) -> np.ndarray:
    """One episode [H', W', 3]: a caption, then each view's real frames over its imagined ones."""
    columns = [f for f in _FRAMES if f < len(real)]
    rows = [
        np.concatenate([world[f, v].repeat(_SCALE, 0).repeat(_SCALE, 1) for f in columns], 1)
        for v in range(real.shape[1])
        for world in (real, imagined)
    ]
    body = np.concatenate([np.pad(r, ((0, 3), (0, 0), (0, 0)), constant_values=255) for r in rows])
    head = Image.new("RGB", (body.shape[1], 2 * _BAR), "white")
    pen, font = ImageDraw.Draw(head), ImageFont.load_default(size=13)
    pen.text((3, 3), f"{name}; real over imagined, each view; chunks:", (27, 31, 36), font)
    for i, f in enumerate(columns):
        pen.text((i * _SCALE * real.shape[3] + 3, _BAR), str(f), (120, 128, 140), font)
    return np.concatenate([np.asarray(head), body])


def _save(path: Path, write: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise write_error(path, error) from error
