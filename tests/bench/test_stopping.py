"""Where rules stop, of what imagination said; and that reality is not asked before they have."""

import json

import pytest

from bench import stopping
from worldenv.runtime.errors import UserError
from worldenv.stages.run import write_record


def judged(**by_world: list[int]) -> dict:
    """Of four episodes each, how many succeed by iteration."""
    worlds = {
        name.replace("_", " "): {
            str(k): [n < count for n in range(4)]
            for k, count in zip(stopping.LOOKED_AT, counts, strict=True)
        }
        for name, counts in by_world.items()
    }
    way = {str(k): 0.01 * k for k in stopping.LOOKED_AT}
    return {**worlds, "distance": way}


def test_rules_stop_where_their_judge_is_best_and_earliest():
    said = judged(
        own=[1, 2, 4, 4, 4],
        own_again=[1, 3, 3, 4, 4],
        later=[1, 3, 2, 2, 1],
        seed_1=[0, 2, 3, 2, 2],
        seed_2=[4, 2, 3, 4, 1],
    )
    stops = {rule: stop(said) for rule, stop in stopping.RULES.items()}
    assert stops["own world"] == 8
    assert stops["two noises"] == 12
    assert stops["later world"] == 4
    assert stops["lower of own and later"] == 4
    assert stops["mean of others' worlds"] == 8
    assert stops["lowest of others' worlds"] == 8
    assert stops["distance 0.05"] == 4
    assert stops["after 20"] == 20


def test_what_is_below_the_best_is_counted_in_hindsight():
    won = {"0": 30, "4": 48, "8": 54, "12": 50, "20": 40}
    seed = {
        "real": {k: {"successes": n} for k, n in won.items()},
        "named": dict.fromkeys(stopping.RULES, 8) | {"after 4": 4},
    }
    table = stopping.ruled({"0": seed})
    assert table["after 8"]["below_best"] == 0
    assert table["after 4"] == {"stops": {"0": 4}, "successes": {"0": 48}, "below_best": 0.1}


def test_stops_are_named_once(tmp_path):
    source, work = tmp_path / "run", tmp_path / "work"
    stages = work / "run" / "stages"
    with pytest.raises(UserError, match="Run judge first"):
        stopping.name(source, work)
    counts = [0, 1, 2, 3, 4]
    write_record(
        stages / "judged.json", judged(own=counts, own_again=counts, later=counts, a=counts)
    )
    first = stopping.name(source, work)
    assert first["own world"] == 20
    counts = counts[::-1]
    write_record(
        stages / "judged.json", judged(own=counts, own_again=counts, later=counts, a=counts)
    )
    assert stopping.name(source, work) == first
    assert json.loads((stages / "named.json").read_text())["own world"] == 20
