"""README.md and docs/tuning.md say what `results/` holds, whatever it grows to."""

import json
import re
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path

import pytest

from bench.results import defaults, experiments, figures, kernels
from bench.results.__main__ import FIGURES, PAGES, REGIONS, render
from bench.results.runs import listed, prose, trained
from worldenv.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_pages_say_what_results_hold(name):
    text = page(name)
    assert render(text, RESULTS) == text, f"{name} has drifted from results/: make results"


def test_every_region_is_on_a_page():
    shown = re.findall(r"^<!-- results: (.*) -->$", "\n".join(map(page, PAGES)), re.MULTILINE)
    assert sorted(shown) == sorted(REGIONS)


def test_prose_about_what_was_measured_has_no_figures():
    """They went stale there."""
    section = page("README.md").split("## Measured")[1].split("## How it works")[0]
    own = re.sub(r"<!-- results:.*?<!-- /results -->", "", section, flags=re.DOTALL)
    own = re.sub(r"`[^`]*`|\]\([^)]*\)", "", own)
    assert re.findall(r"\b\d[\d.,]*", own) == []


def test_the_figure_shows_what_results_hold():
    assert all(name in page("README.md") for name in FIGURES)
    name = "docs/differences.svg"
    about = {e.tag.rpartition("}")[2]: e.text for e in ET.fromstring(page(name)).iter()}
    shown = figures.rows(RESULTS)
    assert about["description"] == figures.described(shown), f"{name} has drifted: make results"
    assert len([row for row in shown if row[2] == "second"]) >= 1, "runs that lost are shown"


# --- folders that grow


def episodes(outcomes: str, tasks: int = 1) -> list[dict]:
    """An episode for each letter, "w" won; two of each start; the same for every task."""
    return [
        {
            "task": task,
            "start": 20 + n // 2,
            "seed": n % 2,
            "success": letter == "w",
            "success_no_oracle": False,
        }
        for task in range(tasks)
        for n, letter in enumerate(outcomes)
    ]


def add(results: Path, file: str, seed: int, before: str, after: str, tasks: int = 1) -> Path:
    """A run like the default's first, with these outcomes, checked never."""
    run = deepcopy(json.loads((RESULTS / "default" / "seed-0.json").read_text()))
    run |= {"seed": seed, "real_episodes_used": 245}
    run["tasks"] = [{"id": task, "instruction": f"do {task}"} for task in range(tasks)]
    run["evaluation"] = {"sft": episodes(before, tasks), "posttrained": episodes(after, tasks)}
    run["fidelity"]["closed_loop_gap"] = None
    for stage in run["stages"].values():
        stage.pop("check_episodes", None)
    path = results / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


def test_nothing_is_refused_where_nothing_was_run(tmp_path):
    for name, draw in REGIONS.items():
        said = draw(tmp_path)
        assert said == defaults.NOT_YET or name == "lost", name
    assert figures.rows(tmp_path) == []


def test_seeds_that_come_later_are_drawn_and_lost_ones_too(tmp_path):
    for seed, after in ((5, "wwww"), (6, "wwww"), (7, "llll")):
        add(tmp_path, f"default/seed-{seed}.json", seed, "wlll", after)
    said = defaults.default(tmp_path)
    assert "| 5 | 1 of 4 | 4 of 4 | " in said
    assert "| 3, 0 |" in said
    assert "| 7 | 1 of 4 | 0 of 4 | -25.0 points" in said
    assert "each seed: 245, " in said
    assert "checks of policies" not in said
    assert "Mean of 3 seeds: +41.7 points (-100.0 to +100.0)" in said
    assert "Fewer successes after post-training: seed 7." in said
    assert "| `default` | 7 | 1 → 0 of 4 |" in defaults.lost(tmp_path)
    assert "imagined − real" not in defaults.world(tmp_path), "none of them was checked"
    assert "| 7 |" in defaults.times(tmp_path)
    assert [row[2] for row in figures.rows(tmp_path)] == [
        "ink",
        "accent",
        "accent",
        "second",
        "ink",
    ]


def test_the_same_data_give_a_figure_of_the_same_bytes(tmp_path):
    add(tmp_path, "default/seed-0.json", 0, "wlll", "wwll")
    first = figures.differences(tmp_path)
    assert first == figures.differences(tmp_path)
    add(tmp_path, "default/seed-1.json", 1, "wlll", "llll")
    assert first != figures.differences(tmp_path)


def test_other_configurations_have_a_table_each(tmp_path):
    add(tmp_path, "default/seed-0.json", 0, "wl", "ww")
    add(tmp_path, "default/seed-0-short.json", 0, "wl", "ll")
    add(tmp_path, "default/checked/seed-0.json", 0, "wl", "wl")
    names = [run.name for run in trained(tmp_path, "default")]
    assert names == ["default", "default/short", "default/checked"]
    said = defaults.default(tmp_path)
    assert [said.index(f"`results/{name}`:") for name in names] == sorted(
        said.index(f"`results/{name}`:") for name in names
    )
    assert said.count("| seed |") == 3


def test_ten_tasks_have_a_row_each_over_all_seeds(tmp_path):
    for seed in range(2):
        add(tmp_path, f"libero_spatial/seed-{seed}.json", seed, "wlll", "wwll", tasks=10)
    path = add(tmp_path, "libero_spatial/seed-2.json", 2, "wlll", "wwll", tasks=10)
    run = json.loads(path.read_text())
    run["sampled"] = {"evaluation": deepcopy(run["evaluation"])}
    for episode in run["evaluation"]["posttrained"]:
        episode["success"] &= episode["task"] != 3
    hand = {"what": "end-effector error", "passed": False}
    gate = {"verdict": "forced", "measures": [hand], "tasks": [0, 1, 2, 5]}
    run["stages"]["posttrain-0"]["gate"] = gate
    path.write_text(json.dumps(run))
    add(tmp_path, "libero_spatial/one/seed-0.json", 0, "wwww", "llll", tasks=10)
    both, one = defaults.suite(tmp_path).split("`results/libero_spatial/one`")
    assert both.count("| 3 of 12 | 6 of 12 |") == 9
    assert "| 3. do 3 | 3 of 12 | 4 of 12 | +8.3 points" in both
    assert "| all | 30 of 120 | 58 of 120 | **+23.3 points**" in both
    assert "+20.0 (seed 2)" in both
    assert "| all, acting with the noise of post-training | 10 of 40 | 20 of 40 |" in both
    words = " ".join(both.split())
    for told in (
        "No task is significantly below",
        "The gate refused the world, and was overruled: seed 2 (end-effector error).",
        "Post-trained in tasks 0, 1, 2 and 5 (seed 2) alone, where imagined",
        "with noise: +25.0 (seed 2);",
    ):
        assert told in words
    assert "with noise" not in one
    assert "The gate refused" not in one
    assert "Post-trained in" not in one
    assert "Significantly below imitation: 0 to 9." in one


def test_arms_of_ten_tasks_have_a_row_each_beside_the_same_seed(tmp_path):
    for seed in (0, 1):
        add(tmp_path, f"libero_spatial/seed-{seed}.json", seed, "wlll", "wwll", tasks=2)
    for name, after in (("neither", "llll"), ("real", "wlll")):
        path = add(tmp_path, f"libero_spatial/seed-0-{name}.json", 0, "wwww", after, tasks=2)
        run = json.loads(path.read_text())
        if name == "neither":
            hand = {"what": "end-effector error", "passed": False}
            run["stages"]["posttrain-0"]["gate"] = {"verdict": "forced", "measures": [hand]}
            lost = {"mean": -0.25, "low": -0.4, "high": -0.1}
            run["no_oracle"] = {"paired_difference": lost}
        else:
            run["stages"]["posttrain-0"].pop("gate", None)
            run["no_oracle"] = None
        path.write_text(json.dumps(run))
    tasks, arms = defaults.suite(tmp_path).split("| arm |")
    assert "| all | 4 of 16 | 8 of 16 |" in tasks, "the arms are none of its seeds"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in arms.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["full", "0"], ["neither", "0"], ["real", "0"]]
    assert rows[1][2:4] == ["refuses: end-effector error", "8 → 0 of 8"]
    assert rows[1][5:] == ["0 → 0, -25.0 points (-40.0 to -10.0)", "0 and 1"]
    assert rows[2][2] == "no world"
    assert rows[2][5] == "-"


def test_an_experiment_is_shown_in_its_own_words(tmp_path):
    for name, text in (
        ("gate", "# The gate\n\nIn short: four of\nfour refused.\n\nMore"),
        ("x", "# X"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text)
    assert experiments.experiments(tmp_path).splitlines() == [
        "- four of four refused: [`results/gate`](results/gate/README.md)",
        "- X: [`results/x`](results/x/README.md)",
    ]


def test_kernels_of_two_machines_stand_side_by_side(tmp_path):
    (tmp_path / "bench").mkdir()
    for isa, ratios in ((2, {"a": 1.25}), (4, {"a": 2.0, "b": 101.4})):
        machine = {"processor": "Some(R) Processor", "isa": isa}
        rows = [{"case": "op (1, 2) float32", "ratios": ratios}]
        content = {"machine": machine, "matmul_flops": {}, "rows": rows}
        (tmp_path / "bench" / f"{isa}.json").write_text(json.dumps(content))
    said = kernels.kernels(tmp_path)
    assert "| case | rivals | Some, f32 | Some, AMX, f32 |" in said
    assert "| `op (1, 2)` | a; b | 1.2; - | 2.0; 101 |" in said


# --- what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- results: wrld -->\n<!-- /results -->", "Did you mean 'world'"),
        ("<!-- results: world -->\n", "Close the open region"),
        ("<!-- results: world -->\n<!-- results: lost -->\n<!-- /results -->", "Close the open"),
        ("<!-- /results -->\n<!-- results: world -->\n", "Close the open region"),
    ],
)
def test_regions_that_are_none_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        render(text, RESULTS)


def test_results_that_are_none_are_refused(tmp_path):
    path = add(tmp_path, "default/seed-0.json", 0, "wl", "www")
    with pytest.raises(UserError, match="1 that only one has"):
        defaults.default(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        defaults.default(tmp_path)


def test_text_of_a_page_is_left_as_it_is(tmp_path):
    text = (
        "# T\n\nx <!-- results: y -->\n\n<!-- results: suite -->\nold\n<!-- /results -->\n\nend\n"
    )
    drawn = render(text, tmp_path)
    assert drawn == text.replace("old", "Not yet run.")
    assert render(drawn, tmp_path) == drawn


def test_a_wrapped_line_never_begins_a_list():
    """ "seed" at a line's end and "1. Then" on the next made a list of it."""
    for length in range(80, 120):
        lines = prose("x" * length + " seed 1. Then - 4 of 5. End").splitlines()
        assert not any(re.match(r"(\d+[.)]|[-+*#>])( |$)", line) for line in lines), lines


def test_numbers_in_a_row_are_a_range():
    assert [listed(x) for x in ([3], [3, 4], [0, 1, 2], [0, 2, 3], ["a", "b", "c"])] == [
        "3",
        "3 and 4",
        "0 to 2",
        "0, 2 and 3",
        "a, b and c",
    ]
