"""The model of a step on several ranks, by arithmetic; and what it is given."""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ranked import Group

from bench import steady
from bench.results import scaling as drawn
from bench.scaling import measure, model
from bench.scaling.__main__ import iteration, quieter, rows
from bench.scaling.model import BLOCK, Cluster, Kind, Messages, Work
from worldenv.config import Config
from worldenv.runtime import parallel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
FREE = Messages(0.0, 0.0, float("inf"))


def test_one_rank_has_its_pieces_and_no_messages():
    work = Work(piece=2.0, rest=0.5, numbers=10**6)
    assert model.step(work, 1, 1.0, Messages(9.0, 9.0, 1.0)) == 8.5
    assert model.step(work, 1, 1.5, threads=2) == 1.5 * 4.5


def test_messages_that_cost_nothing_leave_the_largest_share():
    work = Work(piece=2.0, rest=0.0, numbers=10**6)
    assert [model.step(work, n, 1.0, FREE) for n in (1, 2, 3, 4)] == [8, 4, 4, 2]
    assert model.step(work, 4, 2.0, FREE) == 4, "twice as many ranks as cores"


@pytest.mark.parametrize(
    ("numbers", "ranks", "passed"),
    [
        (10 * BLOCK, 1, 0),
        (10 * BLOCK, 2, 11),  # to the other, and a block back
        (10 * BLOCK, 3, 23),  # the third begins a block later, and sends to both others
        (10 * BLOCK, 4, 24),
        (BLOCK, 4, 6),  # one block: nothing overlaps
    ],
)
def test_blocks_pass_a_chain_while_others_follow(numbers, ranks, passed):
    assert model.hops(numbers, ranks) == passed * BLOCK


def test_the_rate_of_a_hop_is_that_of_the_sum_it_came_from():
    told = {"gather_seconds": 0.001, "sum_of_one_seconds": 0.002, "sum_seconds": 0.402}
    told |= {"gather_large_seconds": 2.0, "gather_large_bytes": 600}
    for ranks in (2, 4):
        found = Messages.of(ranks, told | {"numbers": 16 * BLOCK})
        assert found.seconds(Work(1.0, 1.0, 16 * BLOCK), ranks) == pytest.approx(0.403)
        rollout = found.seconds(Work(1.0, 1.0, 0, told=150), ranks)
        assert rollout == pytest.approx(0.501), "sums nothing, and tells what came of it"


def arms(exchange: float, slow: float) -> dict:
    """Of one kind of work that is told by the model's own rules."""
    alone = {"seconds": 8.5, "piece_seconds": 2.0, "numbers": 16 * BLOCK, "exchange_seconds": 0.0}
    alone |= {"pieces": 4, "rest_seconds": 0.5, "told_bytes": 0}
    two = alone | {"seconds": slow * 4.5 + exchange, "piece_seconds": 2 * slow}
    two["exchange_seconds"] = exchange
    told = {"gather_seconds": 0.0, "sum_of_one_seconds": 0.0, "sum_seconds": exchange}
    told |= {"numbers": 16 * BLOCK, "gather_large_seconds": 1.0, "gather_large_bytes": 10**9}
    kinds = (model.ROLLOUT, model.UPDATE)
    return {
        model.ALONE: {
            "processes": 1,
            "threads": 1,
            "messages": {},
            "work": {k: alone | {"gradients": "a"} for k in kinds},
        },
        model.TWO: {
            "processes": 2,
            "threads": 1,
            "messages": told,
            "work": {k: two | {"gradients": "a"} for k in kinds},
        },
    }


def test_steps_are_predicted_from_one_process_and_messages_alone():
    found = arms(exchange=0.3, slow=1.2)
    assert [row["error"] for row in model.compared(found)] == pytest.approx([0] * 2)
    found[model.TWO]["work"][model.ROLLOUT]["seconds"] *= 2
    assert model.compared(found)[0]["error"] == pytest.approx(-0.5)


def test_staleness_takes_the_longer_and_sharing_half_and_its_messages():
    times = iteration(Config())
    found = model.stale({"arms": arms(exchange=0.3, slow=1.0), "iteration": times})
    assert found["imagined"] == pytest.approx(8.5 * times[model.ROLLOUT])
    assert found["stale"] == max(found["imagined"], found["updated"])
    assert found["least"] == (found["imagined"] + found["updated"]) / 2
    assert found["shared"] == pytest.approx(4.8 * sum(times.values()))
    assert found["exchange"] == pytest.approx(0.3 * sum(times.values()))
    rl = Config().posttrain
    assert times[model.ROLLOUT] * rl.rows == rl.contexts * rl.group
    decisions = times[model.ROLLOUT] * rl.rows * measure.decisions(Config())
    assert times[model.UPDATE] * rl.minibatch == pytest.approx(decisions * rl.epochs)


# --- on paper

FAST = Cluster(nvlink=float("inf"), infiniband=float("inf"), nvlink_step=0, infiniband_step=0)
PLAIN = Cluster(of_link=1.0, reached=1.0, flops=1.0, nvlink=4.0, infiniband=1.0, nvlink_step=0.5)


def test_rings_pass_what_they_must():
    assert Cluster().summed(1e9, 1) == 0
    assert FAST.summed(1e9, 64) == 0
    # 2 (N - 1) / N of 32 bytes over 4 a second, and 2 (N - 1) steps.
    assert PLAIN.summed(32, 8) == pytest.approx(2 * 7 / 8 * 32 / 4 + 14 * 0.5)
    # Among two nodes each GPU has an eighth.
    among = 2 * (1 / 2 * 4 / 1.0 + PLAIN.infiniband_step)
    assert PLAIN.summed(32, 16) == pytest.approx(PLAIN.summed(32, 8) + among)


def test_sharded_weights_are_gathered_twice_and_summed_for_every_micro_batch():
    kind = Kind("k", "sharded", 64.0, 16, numbers=4, layers=3, micro=1)
    once = PLAIN.scattered(4 * (2 + 2 + 4), 8, 9)
    assert kind.messages(PLAIN, 8, 1.0) == pytest.approx(2 * once), "two samples on each"
    assert kind.ratio(PLAIN, 8, 1.0) == pytest.approx(2 * once / 8)
    assert kind.messages(PLAIN, 1, 1.0) == 0


def test_messages_count_from_where_they_no_longer_end():
    kind = Kind("k", "gathered", 100.0, 64, size=10.0)
    # 10 / (100 * largest / 64) > 0.5 from largest 12 on: five GPUs have 13, six 11.
    assert kind.first(0.5, PLAIN, 1.0) == 6
    assert kind.first(9.0, PLAIN, 1.0) is None
    assert model.gpu_counts(PLAIN, 40) == [2, 3, 4, 5, 6, 7, 8, 16, 24, 32, 40]
    assert model.gpu_counts(PLAIN, 3) == [2, 3]


# --- what is measured and drawn


def ranked(folder: Path) -> dict:
    """An arm of tiny kinds of work that last, beside what a sum or a gather of nothing takes."""
    weight = torch.nn.Parameter(torch.ones(8))

    def last(seconds: float, k: int = 0) -> tuple[torch.Tensor, None]:
        time.sleep(seconds)
        return weight.square().mean() * k, None

    losses = [partial(last, 0.02, k) for k in range(4)]

    def step() -> list[torch.Tensor]:
        parallel.gradients([weight], losses)
        return [weight.grad]

    small = replace(Config(), posttrain=replace(Config().posttrain, rows=4))
    told = measure.rollout(partial(last, 0.002), small)
    works = {"tiny": steady.Work(step, losses[0]), "told": told}
    found = measure.arm(works, 1, 0.0)
    return {"found": json.dumps(found)}


def test_an_arm_has_what_the_model_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LARGE", 1)
    alone = json.loads(ranked(tmp_path)["found"])
    parallel.use_threads()
    (two, _) = (json.loads(of["found"]) for of in Group(ranked, tmp_path, 2).found())
    found = {
        model.ALONE: {"processes": 1, "threads": 1, **alone},
        model.TWO: {"processes": 2, "threads": 1, **two},
    }
    compared = model.compared(quieter(found, found))
    assert all(row["predicted_seconds"] > 0 for row in compared)
    assert [row["work"] for row in compared] == ["tiny", "told"]
    assert two["work"]["tiny"]["numbers"] == 8
    assert two["messages"]["gather_large_bytes"] == 2 * 4 * BLOCK
    seen = 4 * measure.decisions(Config()) * Config().env.views * 3 * Config().env.image_size ** 2
    assert two["work"]["told"]["told_bytes"] == seen
    assert [row["same_bits"] for row in rows(found)] == [True] * 4
    found[model.TWO]["work"]["tiny"]["gradients"] = "other"
    assert not rows(found)[2]["same_bits"]


def test_of_two_rounds_the_quieter_counts():
    one = {"seconds": 2.0, "numbers": 5, "of": {"x": 1.0}, "gradients": None}
    assert quieter(one, one | {"seconds": 1.0, "of": {"x": 3.0}}) == one | {"seconds": 1.0}


def test_pages_show_a_measurement_as_it_is(tmp_path):
    found = arms(exchange=0.3, slow=1.2)
    threads = found[model.TWO] | {"processes": 1, "threads": 2}
    report = {
        "machine": {"processor": "Some(R) Processor", "cores": 2},
        "arms": found | {"1 process of 2 threads": threads},
        "iteration": iteration(Config()),
        "whole": {"total_seconds": {model.TWO: 60.0}},
    }
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "scaling-some.json").write_text(json.dumps(report))
    said = drawn.scaling(tmp_path).replace("\n", " ")
    assert "| 8.50 s | 1.49 (1.49) | 1.49 (1.57) | 300 ms |" in said
    assert "Rollout on 2 processes of 1 thread: 75% of twice one." in said
    assert "60 s on 2 processes of 1 thread" in said
    assert "stale, would take" in drawn.staleness(tmp_path)


def test_what_is_kept_has_the_bits_of_one_process_and_errors_that_the_readme_tells():
    for path in (RESULTS / "bench").glob("scaling-*.json"):
        arms = json.loads(path.read_text())["arms"]
        assert all(row["same_bits"] for row in rows(arms))
        worst = max((row["error"] for row in model.compared(arms)), key=abs)
        assert f"{worst:+.0%} at most" in " ".join((ROOT / "README.md").read_text().split())


def test_the_figure_says_that_it_is_on_paper():
    text = (ROOT / "docs" / "scaling.svg").read_text()
    assert drawn.TITLE in text
    assert "not run on a GPU" in drawn.TITLE
    shown = drawn.lines(RESULTS)
    assert drawn.described(shown).replace("&", "&amp;") in text, "make results"
    assert {name for name, *_ in shown} >= {"policy, adapters", "world in full, sharded"}
    assert "On paper, not run on a GPU" in drawn.on_paper(RESULTS)
