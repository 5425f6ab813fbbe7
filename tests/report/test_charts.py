"""Charts are well-formed SVG that shows the data it was given."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from worldenv.report.charts import WIDTH, Series, bar, interval_chart, line_chart


def parse(svg):
    root = ET.fromstring(svg)
    lines = [
        np.array([[float(v) for v in point.split(",")] for point in line.get("points").split()])
        for line in root.iter("polyline")
    ]
    return lines, [text.text for text in root.iter("text")], root


def test_line_stays_inside_and_keeps_its_shape():
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e4):
        y = rng.normal(size=20) * scale
        (line,), _, root = parse(line_chart([Series("a", range(20), y)]))
        height = float(root.get("viewBox").split()[3])
        assert (line >= 0).all()
        assert (line[:, 0] <= WIDTH).all()
        assert (line[:, 1] <= height).all()
        assert np.corrcoef(line[:, 1], y)[0, 1] == pytest.approx(-1, abs=1e-4)


def test_axis_turns_logarithmic_for_wide_positive_data():
    x = np.arange(50)
    (line,), labels, _ = parse(line_chart([Series("loss", x, np.exp(-x / 5.0))]))
    assert np.corrcoef(line[:, 1], x)[0, 1] == pytest.approx(1, abs=1e-4)
    assert {"1", "0.1", "0.01", "1e-4"} <= set(labels)
    (line,), _, _ = parse(line_chart([Series("a", x, np.exp(-x / 5.0) - 0.1)]))
    assert np.corrcoef(line[:, 1], x)[0, 1] < 0.95


def test_many_points_are_averaged_and_missing_ones_left_out():
    y = np.ones(5000)
    y[::7] = np.nan
    (line,), _, _ = parse(line_chart([Series("a", range(5000), y)]))
    assert len(line) == 240
    assert np.ptp(line[:, 1]) == 0
    assert "No values" in line_chart([Series("a", [0, 1], [float("nan")] * 2)])
    (line,), _, _ = parse(line_chart([Series("a", [3], [0.0])]))
    assert len(line) == 1


def test_legend_names_are_escaped():
    lines, labels, _ = parse(
        line_chart([Series("a<b", [0, 1], [0, 1]), Series("c&d", [0, 1], [1, 0])])
    )
    assert len(lines) == 2
    assert {"a<b", "c&d"} <= set(labels)


def test_intervals_lie_on_one_scale():
    _, labels, root = parse(
        interval_chart([("x", 0.5, 0.25, 1.0, "red"), ("y", 0.0, 0.0, 0.1, "red")])
    )
    dots = [float(c.get("cx")) for c in root.iter("circle")]
    spans = [s for s in root.iter("line") if "stroke:red" in (s.get("style") or "")]
    assert dots[0] == pytest.approx((12 + WIDTH - 14) / 2, abs=0.2)
    assert float(spans[0].get("x2")) == pytest.approx(WIDTH - 14, abs=0.2)
    assert dots[1] == pytest.approx(12, abs=0.2)
    assert {"x", "y", "0%", "100%"} <= set(labels)


def test_bar_is_clamped():
    assert "width:100.0%" in bar(3.0)
    assert "width:0.0%" in bar(-1.0)
