"""Charts are well-formed SVG that shows the data it was given."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from worldenv.report.charts import PALETTE, Series, bar, interval_chart, line_chart


def parse(svg):
    """Lines by colour [N, 2], texts, markers' places [N, 2] by colour, and the root."""
    root = ET.fromstring(svg)
    lines, dots = {}, {}
    for path in root.iter("path"):
        colour = re.search(r"fill: none; .*stroke: var\(--(\w+)\)", path.get("style") or "")
        if colour and colour[1] != "rule":
            numbers = [float(v) for v in re.findall(r"-?[\d.]+", path.get("d"))]
            lines.setdefault(colour[1], np.reshape(numbers, (-1, 2)))
    for use in root.iter("use"):
        colour = re.search(r"fill: var\(--(\w+)\)", use.get("style"))[1]
        dots.setdefault(colour, []).append((float(use.get("x")), float(use.get("y"))))
    return lines, [text.text for text in root.iter("text")], dots, root


def test_line_stays_inside_and_keeps_its_shape():
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e4):
        y = rng.normal(size=20) * scale
        lines, _, dots, root = parse(line_chart("t", [Series("a", range(20), y)]))
        size = np.array(root.get("viewBox").split()[2:], float)
        assert ((lines["accent"] >= 0) & (lines["accent"] <= size)).all()
        assert np.corrcoef(np.array(dots["accent"])[:, 1], y)[0, 1] == pytest.approx(-1, abs=1e-4)


def test_axis_turns_logarithmic_for_wide_positive_data():
    x = np.arange(24)
    _, labels, dots, _ = parse(line_chart("t", [Series("loss", x, np.exp(-x / 2.5))]))
    down = np.array(dots["accent"])[:, 1]
    assert np.corrcoef(down, x)[0, 1] == pytest.approx(1, abs=1e-4)
    assert {"1", "0.1", "0.01", "0.001"} <= set(labels), "labels are not rounded like places"
    _, _, dots, _ = parse(line_chart("t", [Series("a", x, np.exp(-x / 2.5) - 0.1)]))
    assert np.corrcoef(np.array(dots["accent"])[:, 1], x)[0, 1] < 0.95


def test_many_points_are_averaged_and_missing_ones_left_out():
    y = np.where(np.arange(24_000) % 2, 1.0, -1.0)
    y[:24] = np.nan
    chart = line_chart("t", [Series("a", range(24_000), y)], y_range=(-1, 1))
    line = parse(chart)[0]["accent"]
    assert len(line) <= 240
    assert np.ptp(line[:, 1]) < 5
    assert "No values" in line_chart("t", [Series("a", [0, 1], [float("nan")] * 2)])
    assert len(parse(line_chart("t", [Series("a", [3], [0.0])]))[2]["accent"]) == 1


def test_axes_that_nearly_reach_zero_show_it():
    assert "0" in parse(line_chart("t", [Series("a", [0, 1], [2, 8])]))[1]
    assert "0" not in parse(line_chart("t", [Series("a", [1, 2], [7, 8])]))[1]
    assert (
        "0%"
        in parse(
            line_chart("t", [Series("a", [1, 2], [0.07, 0.08])], percent=True, from_zero=True)
        )[1]
    )


def test_a_band_lies_around_its_line():
    line, band = Series("a", range(3), [2, 3, 4]), [(1, 3), (2, 4), (3, 5)]
    assert "opacity" not in line_chart("t", [line])
    lines, _, _, root = parse(line_chart("t", [replace(line, band=band)]))
    (use,) = (u for u in root.iter("use") if "opacity" in u.get("style"))
    (shape,) = (p for p in root.iter("path") if f"#{p.get('id')}" == use.get("href"))
    edge = np.reshape([float(v) for v in re.findall(r"-?[\d.]+", shape.get("d"))], (-1, 2))
    for x, y in lines["accent"]:
        ends = edge[np.abs(edge[:, 0] - x) < 0.1, 1] + float(use.get("y"))
        unit = -np.ptp(lines["accent"][:, 1]) / 2
        assert sorted({*np.round((ends - y) / unit, 2)}) == [-1, 1]


def test_a_constant_is_drawn_flat():
    noisy = -3.7329483 + 1e-7 * np.arange(5)
    lines, labels, _, _ = parse(line_chart("t", [Series("a", range(5), noisy)]))
    assert np.ptp(lines["accent"][:, 1]) < 0.1
    assert max(map(len, labels)) < 6


def test_names_are_escaped():
    series = [Series("a<b", [0, 1], [0, 1]), Series("c&d", [0, 1], [1, 0])]
    lines, labels, _, root = parse(line_chart('"x" < y & z', series))
    assert set(lines) >= {"accent", "second"}
    assert {"a<b", "c&d"} <= set(labels)
    assert root.get("aria-label") == root.find("title").text == '"x" < y & z'


def test_a_chart_is_said_in_words():
    root = parse(line_chart("t", [Series("real", [0, 5], [0.4, 0.62])], "iteration", percent=True))[
        3
    ]
    assert root.find("desc").text == "real: 40% at iteration 0 to 62% at 5"
    assert root.get("role") == "img"
    root = parse(interval_chart("t", [("before", 0.5, 0.25, 1.0, "before")]))[3]
    assert root.find("desc").text == "before: 50% (25% to 100%)"


def test_charts_take_fonts_and_colours_from_the_page_and_repeat_to_the_byte():
    draw = lambda: line_chart("t", [Series("a", range(9), range(9)), Series("b", [0], [1])])  # noqa: E731
    svg = draw()
    assert svg == draw()
    assert "font-family" not in svg
    assert "DejaVu" not in svg
    assert not [value for value in PALETTE.values() if value in svg]
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "http" not in svg
    assert "<style" not in svg


def test_charts_of_one_page_share_no_name():
    series = [Series("a", range(9), range(9))]
    names = [set(re.findall(r'id="([^"]+)"', line_chart(t, series))) for t in ("x", "y")]
    assert names[0]
    assert not names[0] & names[1]


def test_a_matplotlibrc_changes_nothing(tmp_path):
    code = "from worldenv.report.charts import *; print(line_chart('t', [Series('a', [0], [1])]))"
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\naxes.facecolor: red\n")
    drawn = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True
        ).stdout
        for folder in (tmp_path, tmp_path.parent)
    ]
    assert drawn[0] == drawn[1]


def test_matplotlib_waits_until_a_page_is_drawn():
    slow = "{'matplotlib', 'scipy.stats'}"
    code = f"import sys, worldenv.cli; assert not {slow} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_intervals_lie_on_one_scale():
    rows = [("x", 0.5, 0.25, 1.0, "accent"), ("y", 0.0, 0.0, 0.1, "second")]
    lines, labels, dots, _ = parse(interval_chart("t", rows))
    (half,), (zero,) = dots["accent"], dots["second"]
    low, high = lines["accent"][:, 0]
    whole = high - zero[0]
    assert half[0] - zero[0] == pytest.approx(0.5 * whole, abs=0.2)
    assert low - zero[0] == pytest.approx(0.25 * whole, abs=0.2)
    assert lines["second"][1, 0] - zero[0] == pytest.approx(0.1 * whole, abs=0.2)
    assert {"x", "y", "0%", "100%"} <= set(labels)


def test_bar_is_clamped():
    assert "width:100.0%" in bar(3.0)
    assert "width:0.0%" in bar(-1.0)
