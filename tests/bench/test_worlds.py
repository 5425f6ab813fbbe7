"""Each variant of a world has a folder of its own, and the episodes it is to be trained on."""

from dataclasses import replace

import pytest

from bench import worlds
from worldenv.presets import preset
from worldenv.stages.run import Run


@pytest.fixture
def sources(tmp_path):
    """Two runs of different seeds."""
    found = []
    for seed in (0, 1):
        run = Run(replace(preset("smoke"), run_dir=tmp_path / f"run-{seed}", seed=seed))
        for part in ("demonstrations", "explore-0"):
            run.path("data", part, "00000.hdf5").write_text(f"{part} of {seed}")
        run.save_config()
        run.close()
        found.append(run.dir)
    return found


@pytest.mark.parametrize("name", [n for n in worlds.VARIANTS if n != "near successes"])
def test_a_variant_changes_what_it_is_called_by(sources, tmp_path, name):
    run = worlds.opened(sources[0], tmp_path / "work", name, sources)
    own = preset("smoke").simulator
    part = run.config.simulator
    run.close()
    asked = {
        "as it is": own,
        "data 5x": own,
        "steps 4x": replace(own, steps=4 * own.steps),
        "data 5x, steps 4x": replace(own, steps=4 * own.steps),
        "steps 16x": replace(own, steps=16 * own.steps),
        "window 2": replace(own, window=2),
        "window 2, equal time": replace(own, window=2, steps=part.steps),
        "window 4": replace(own, window=4, frames=5),
        "window 4, equal time": replace(own, window=4, frames=5, steps=part.steps),
        "window 2, history": replace(own, window=2, history_gradient=True),
    }
    assert part == asked[name]
    assert ("equal time" in name) == (part.steps < own.steps)
    said = sorted(p.read_text() for p in (run.dir / "data" / "explore-0").rglob("*.hdf5"))
    seeds = (0, 1) if "data" in name else (0,)
    assert said == [f"explore-0 of {seed}" for seed in seeds]
    shown = [p.read_text() for p in (run.dir / "data" / "demonstrations").iterdir()]
    assert shown == ["demonstrations of 0"]
