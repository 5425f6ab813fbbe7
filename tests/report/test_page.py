"""The report of a made-up run. To look at one: python tests/report/test_page.py <folder>."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from worldenv.report import curves
from worldenv.report.curves import group_metrics
from worldenv.report.page import write_report
from worldenv.report.video import side_by_side, write_video
from worldenv.runtime.errors import UserError


def rollout(rng, steps=20, noise=0.0):
    """A rollout [T, 2, 64, 64, 3] of a block that slides over a table."""
    images = np.empty((steps, 2, 64, 64, 3), np.uint8)
    images[:] = (182, 156, 124)
    for t in range(steps):
        x = 6 + 2 * t
        images[t, 0, 24:36, x : x + 12] = (60, 64, 74)
        images[t, 0, 44:50, 20:50] = (236, 232, 226)
        images[t, 1, 20 + t : 44 + t, 18:46] = (60, 64, 74)
    return np.clip(images + rng.normal(0, noise, images.shape), 0, 255).astype(np.uint8)


def evaluation(rng, tasks):
    rows = {"sft": [], "posttrained": []}
    for task in tasks:
        for start in range(20, 50):
            skill = rng.uniform(-0.25, 0.25)
            for seed in (1000, 2000, 3000):
                for policy, rate in (("sft", 0.44), ("posttrained", 0.8)):
                    success = bool(rng.random() < rate + skill)
                    rows[policy].append(
                        {
                            "task": task,
                            "start": start,
                            "seed": seed,
                            "success": success,
                            "success_no_oracle": success and bool(rng.random() < 0.95),
                            "steps": int(rng.integers(80, 220)),
                        }
                    )
    return rows


def build(folder: Path, tasks=(3,), videos=2) -> Path:
    """A run folder with everything a report can show."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    horizons = (1, 2, 4, 8, 12, 16)
    false_positive = np.linspace(0, 1, 41)
    results = {
        "preset": "default",
        "seed": 0,
        "commit": "83e7016",
        "command": ["worldenv-train", "--preset", "default"],
        "suite": "libero_spatial",
        "tasks": [{"id": t, "instruction": f"do task {t}"} for t in tasks],
        "evaluation": evaluation(rng, tasks),
        "fidelity": {
            "outcome_agreement": 0.94,
            "closed_loop_gap": 0.06,
            "psnr_per_horizon": {str(h): 33 - 2.6 * math.log2(h) for h in horizons},
            "psnr_copy_per_horizon": {str(h): 23 - 0.95 * math.log2(h) for h in horizons},
            "eef_error_cm_per_horizon": {str(h): 0.19 + 0.075 * h for h in horizons},
        },
        "reflector": {
            "auc": 0.957,
            "false_stop_rate": 0.11,
            "roc": {"fpr": false_positive.tolist(), "tpr": (false_positive**0.09).tolist()},
        },
        "stages": {
            name: {"seconds": seconds, "episodes": episodes}
            for name, seconds, episodes in (
                ("collect", 49.2, 85),
                ("sft", 97.0, 5),
                ("simulator-0", 570.0, 80),
                ("reflector", 44.0, 80),
                ("fidelity", 21.5, 16),
                ("posttrain", 240.8, 0),
                ("evaluate", 141.0, 180),
            )
        },
        "frames_per_second": 1386.4,
        "real_episodes_used": 85,
        "peak_memory_bytes": 4_512_000_000,
        "machine": {"cpu": "a laptop", "cores": 2, "memory_bytes": 16_000_000_000, "gpu": None},
    }
    hand = {
        "what": "hand",
        "unit": "cm",
        "least": False,
        "limit": 2.0,
        "value": 0.6,
        "passed": True,
    }
    hand |= {"low": 0.5, "high": 0.7, "n": 20}
    results["stages"]["posttrain"]["gate"] = {"verdict": "passed", "measures": [hand]}
    (folder / "results.json").write_text(json.dumps(results))
    rows = []
    for step in range(0, 800, 5):
        rows.append(
            ("sft", step, {"loss": 0.5 * math.exp(-step / 120) + 0.03 + 0.01 * rng.random()})
        )
    for step in range(0, 1200, 5):
        decay = math.exp(-step / 200) + 0.02 + 0.01 * rng.random()
        rows.append(("simulator", step, {"image_loss": decay, "proprio_loss": 0.3 * decay}))
    for round_ in range(2):
        for step in range(10):
            t = round_ * 10 + step
            values = {
                "reward": 0.4 + 0.025 * t + 0.03 * rng.normal(),
                "imagined_success": 0.4 + 0.025 * t + 0.03 * rng.normal(),
                "kl_behaviour": 0.004 + 0.002 * rng.random(),
                "kl_reference": 0.0,
                "clip_fraction": 0.08 + 0.03 * rng.random(),
                "ratio_mean": 1 + 0.01 * rng.normal(),
                "ratio_max": 1.5 + 0.1 * rng.normal(),
                "mu_change": 0.01 + 0.002 * rng.random(),
                "live_groups": float(rng.integers(8, 16)),
                "frames_per_second": 1300 + 40 * rng.normal(),
                "entropy": -9 + 0.05 * rng.normal(),
                "policy_loss": -0.01 + 0.004 * rng.normal(),
            }
            if step % 5 == 0:
                check = {"imagined": 0.46 + 0.02 * t, "real": 0.42 + 0.02 * t}
                rows.append((f"check-{round_}", step, check))
            rows.append((f"posttrain-{round_}", step, values))
    with (folder / "metrics.jsonl").open("w") as file:
        for stage, step, values in rows:
            file.write(json.dumps({"stage": stage, "step": step, "time": 0.0, **values}) + "\n")
    for number in range(videos):
        picture = side_by_side(rollout(rng, 16 + number), rollout(rng, 18, noise=14))
        write_video(folder / "media" / f"start-{20 + number}.mp4", picture, fps=5)
        (folder / "media" / f"start-{20 + number}.json").write_text(
            json.dumps(
                {
                    "title": f"Start {20 + number}, post-trained",
                    "caption": "Real: success at step 112. Imagined: success at step 120.",
                }
            )
        )
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(build(tmp_path_factory.mktemp("run"), tasks=(3, 5))).read_text()


def test_a_distillation_is_drawn_where_there_was_one():
    reached = {
        arm: {"psnr_per_horizon": {"1": psnr, "8": psnr - 3}}
        for arm, psnr in (("teacher", 21.0), ("before", 19.0), ("self_forcing", 20.5))
    }
    results = {"fidelity": {"psnr_per_horizon": {"1": 20.5, "8": 17.5}}}
    assert "distilled" not in curves.world(results)
    html = curves.world({**results, "stages": {"distill-0": {"reached": reached}}})
    assert "PSNR of few passes a frame, distilled, dB" in html
    assert "self forcing" in html


def test_figures_with_intervals_are_drawn_with_bands():
    rising = {str(h): {"value": h, "low": h - 0.5, "high": h + 0.5, "n": 9} for h in (1, 2, 8)}
    plain = {"fidelity": {"eef_error_cm_per_horizon": {"1": 1.0, "8": 8.0}}}
    sure = {"fidelity": {"psnr": {"moving": {"front": rising}}, "hand_error_cm": rising}}
    assert [curves.world(r).count("fill-opacity") for r in (plain, sure)] == [0, 2]
    assert "Bands: 95%" in curves.world(sure)
    assert "Bands" not in curves.world(plain)


def words(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_headline_states_the_paired_result(page):
    text = words(page[page.index("<header>") : page.index("</header>")])
    rows = evaluation(np.random.default_rng(0), (3, 5))
    before, after = (sum(r["success"] for r in rows[k]) for k in ("sft", "posttrained"))
    assert f"{before / 180:.0%} → {after / 180:.0%}" in text
    assert f"{before} of 180" in text
    assert f"{after} of 180" in text
    pairs = list(zip(rows["sft"], rows["posttrained"], strict=True))
    gained = sum(b["success"] < a["success"] for b, a in pairs)
    lost = sum(b["success"] > a["success"] for b, a in pairs)
    assert f"Paired over 180 episodes: {gained} gained, {lost} lost, exact McNemar p = " in text
    assert f"{100 * (after - before) / 180:+.0f} points (95% interval +" in text
    assert "The interval lies above zero" in text


def test_page_needs_nothing_else(page):
    assert "://" not in page  # which base64 never says by chance
    assert re.findall(r'(?:src|href|poster)="(?!data:|#)', page) == []
    assert page.count('src="data:video/mp4;base64,') == 2
    assert page.count('poster="data:image/png;base64,') == 2


def test_every_section_is_filled(page):
    assert "has not run" not in page
    text = words(page)
    for expected in (
        "do task 3",
        "exploring imagined real",
        "Outcome agreement 94%",
        "+6 points",
        "0.957",
        "Success, imagined against real",
        "KL divergence",
        "Clip fraction",
        "Probability ratio",
        "Groups with signal",
        "PSNR of predicted frames",
        "End-effector error, cm",
        "hand at most 2 cm 0.6 cm 0.5 to 0.7, n = 20 passes",
        "simulator-0 9 min 30 s",
        "total 19 min 23 s",
        "Start 20, post-trained",
        "worldenv-train --preset default",
        "peak memory 4.2 GB",
    ):
        assert expected in text, expected
    assert "kl reference" not in text, "a constant zero is not drawn"


@pytest.mark.parametrize("results", [{}, {"sft": {"successes": 3, "episodes": 9}}])
def test_missing_sections_say_so(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = words(write_report(tmp_path).read_text())
    for what in ("post-training", "fidelity check", "check of the reflector", "training", "timing"):
        assert re.search(rf"The {what}.*? has not run in this folder", text), what
    assert ("33%" in text) == bool(results)
    assert ("Not evaluated yet" in text) == (not results)


def test_totals_alone_make_a_headline(tmp_path):
    results = {
        "sft": {"successes": 30, "episodes": 90},
        "posttrained": {"successes": 27, "episodes": 90},
        "paired_difference": {"mean": -0.033, "low": -0.12, "high": 0.05},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = words(write_report(tmp_path).read_text())
    assert "33% → 30%" in text
    assert "−3 points (95% interval −12 to +5" in text
    assert "includes zero" in text


def test_rounds_follow_one_another():
    rows = [
        {"stage": stage, "step": step}
        for stage, step in (
            ("posttrain-0", 0),
            ("posttrain-0", 9),
            ("check-1", 5),
            ("posttrain-1", 0),
            ("posttrain-1", 3),
            ("sft", 7),
        )
    ]
    grouped = group_metrics(rows)
    assert [r["x"] for r in grouped["posttrain"]] == [0, 9, 10, 13]
    assert [r["x"] for r in grouped["check"]] == [15]
    assert [r["x"] for r in grouped["sft"]] == [7]


def test_text_is_escaped(tmp_path):
    results = {"preset": "<script>alert(1)</script>", "machine": {"cpu": "<b>&"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text()
    assert "<script>" not in page
    assert "&lt;b&gt;&amp;" in page


def test_bad_results(tmp_path):
    with pytest.raises(UserError, match="Run worldenv-train first"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object, got list"):
        write_report(tmp_path)


if __name__ == "__main__":
    print(write_report(build(Path(sys.argv[1]), tasks=(3, 5))))


def test_both_thresholds_of_the_last_round_are_shown_with_their_intervals():
    first = {"threshold": 0.7, "real_threshold": 0.6}
    last = {"threshold": 0.92, "threshold_interval": [0.81, 0.95]}
    last |= {"real_threshold": 0.883, "real_threshold_interval": [0.783, 0.958]}
    results = {"reflector": {"auc": 0.9}, "stages": {"reflector-0": first, "reflector-1": last}}
    shown = curves.reflector(results)
    for text in ("Threshold, imagined", "0.920", "0.810 to 0.950", "Threshold, real", "0.883"):
        assert text in shown
    results["stages"] = {"reflector-0": first}  # of a version without intervals
    assert "interval" not in curves.reflector(results)
    assert "Threshold" not in curves.reflector({"reflector": {"auc": 0.9}})
