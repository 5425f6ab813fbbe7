"""Suites without a scripted expert, from files in LIBERO's official layout to the report.

Official assets are not shipped: where they are absent a stand-in takes the real benchmark's place
(the same interface, no physics), and everything else is the program itself.
"""

import json
from dataclasses import replace

import pytest
from official_files import write_official
from stand_in import StandIn

from worldenv.config import DataConfig, PolicyConfig
from worldenv.data.libero_tasks import SUITES, instruction_of
from worldenv.envs.libero import benchmark
from worldenv.presets import preset
from worldenv.stages import pipeline
from worldenv.stages.run import Run

TASKS = {"libero_goal": 7, "libero_10": 2}


def tiny(folder, suite):
    """The smoke preset, smaller still: one round, one task."""
    base = preset("smoke")
    return replace(
        base,
        run_dir=folder / "run",
        env=replace(base.env, suite=suite, tasks=(TASKS[suite],), max_steps=32),
        data=DataConfig(paths=(folder / "official",), episodes=2),
        policy=PolicyConfig(width=32, layers=1, heads=2, encoder_channels=8),
        sft=replace(base.sft, steps=2, batch=4),
        simulator=replace(base.simulator, steps=2),
        reflector=replace(base.reflector, steps=2),
        posttrain=replace(base.posttrain, rounds=1, iterations=1, contexts=1),
    )


def trained(config, suite) -> dict:
    name = SUITES[suite][TASKS[suite]]
    write_official(config.data.paths[0] / suite / f"{name}_demo.hdf5", demos=3, size=128, steps=40)
    run = Run(config)
    try:
        return json.loads(pipeline.run_all(run).read_text())
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("suite", TASKS)
def test_trains_from_files_with_a_stand_in_for_reality(tmp_path, monkeypatch, suite):
    monkeypatch.setattr(benchmark, "LiberoVectorEnv", StandIn)
    monkeypatch.setattr(benchmark, "resolve_assets", lambda *_: None)
    results = trained(tiny(tmp_path, suite), suite)
    assert results["stages"]["demonstrations"]["episodes"] == 2
    assert results["tasks"][0]["instruction"] == instruction_of(SUITES[suite][TASKS[suite]])
    assert results["posttrained"]["episodes"] == 2
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.libero
@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("suite", TASKS)
def test_trains_from_files_in_the_real_benchmark(tmp_path, suite):
    results = trained(tiny(tmp_path, suite), suite)
    assert results["stages"]["demonstrations"]["episodes"] == 2
    assert results["posttrained"]["episodes"] == 2
