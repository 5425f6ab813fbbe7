"""Data that is larger than memory: what stays on the disk, what is planned for it, and a reader
that is a step ahead."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot_files import write_lerobot
from official_files import write_official

from worldenv.config import DataConfig
from worldenv.data.disk import Frames
from worldenv.data.libero_tasks import SUITES
from worldenv.data.reading import on_disk, read_episodes
from worldenv.data.windows import ActionWindows
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator
from worldenv.stages import collect, demonstrations, pipeline, plan, plan_data, training
from worldenv.stages.run import Run


@pytest.fixture
def config(tmp_path):
    """Two demonstrations in a LeRobotDataset, one of them of another task, and two in a file."""
    texts = ("turn on the stove", "Put the bowl on the stove")
    write_lerobot(tmp_path / "files/set", "v3.0", lengths=(40, 36), size=64, texts=texts)
    path = tmp_path / f"files/libero_goal/{SUITES['libero_goal'][7]}_demo.hdf5"
    write_official(path, "before", demos=2, steps=40, size=64)
    base = preset("smoke")
    return replace(
        base,
        run_dir=tmp_path / "run",
        device="cpu",
        env=replace(base.env, suite="libero_goal", tasks=(7, 1)),
        data=DataConfig(paths=(tmp_path / "files",)),
    )


@pytest.fixture(autouse=True)
def _forgotten():
    plan_data._KNOWN.clear()
    collect._say.cache_clear()


def with_memory(config, gib: float):
    return replace(config, data=replace(config.data, memory=gib))


def has_room(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_run_reads_what_is_beyond_the_budget_as_it_is_drawn(config, capsys):
    run = Run(config)
    pipeline.run_stage(run, "demonstrations")
    run.close()
    held = collect.recorded(Run(config, writes=False), "demonstrations")
    assert isinstance(held[0].images, np.ndarray)
    capsys.readouterr()
    for views in (2, 1):
        small = replace(config, env=replace(config.env, views=views))
        there = collect.recorded(Run(with_memory(small, 1e-4), writes=False), "demonstrations")
        assert len(there) == len(held)
        for a, b in zip(held, there, strict=True):
            assert isinstance(b.images, Frames)
            assert np.array_equal(a.images[:, :views], b.images[:])
    said = capsys.readouterr().out
    assert said.count("demonstrations: 0.00") == 1
    assert "GiB, more than --data.memory 0.0001: read as they are drawn" in said
    a, b = collect.statistics(held), collect.statistics(there)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_demonstrations_are_counted_by_metadata_alone(config):
    found = plan_data.recorded(config).folders[0]
    assert (found.episodes, found.frames, found.largest) == (4, 160, 123)
    plan_data._KNOWN.clear()
    for file in config.data.paths[0].rglob("*"):
        if file.suffix in (".mp4", ".parquet") and "meta" not in file.parts:
            file.write_bytes(b"")
    assert plan_data.recorded(config).folders[0] == found
    one = replace(config, data=replace(config.data, episodes=1))
    assert plan_data.recorded(one).folders[0].episodes == 2
    with pytest.raises(UserError, match="got none of libero_goal task 3"):
        plan_data.recorded(replace(config, env=replace(config.env, tasks=(3,))))


def test_the_plan_holds_no_frames_that_stay_on_the_disk(config):
    frame = demonstrations.frame_bytes(config)
    data, there = (plan_data.recorded(with_memory(config, m)) for m in (2.0, 0.0))
    assert (data.held(True), data.index(), data.on_disk) == (160, {}, False)
    assert data.held() == 160 + data.explored
    assert there.held() == 0
    assert there.on_disk
    assert sum(there.index().values()) < 0.05 * data.held() * frame
    between = 160.5 * frame / plan_data.GIB  # each folder by itself
    assert not plan_data.recorded(with_memory(config, between)).folders[0].on_disk
    assert plan_data.disk(config)[0] >= (160 + data.explored) * frame


def test_a_disk_without_room_is_found_before_anything_is_copied(config, monkeypatch, capsys):
    run = Run(config)
    has_room(monkeypatch, 1 << 20)
    with pytest.raises(UserError, match=r"expected 0\.0 GiB of room for 4 demonstrations.*--data"):
        pipeline.run_stage(run, "demonstrations")
    assert not [*(run.dir / "data" / "demonstrations").rglob("*.*")]
    run.close()
    said = plan._disk(SimpleNamespace(disk=(2, 1), data=plan_data.recorded(config)))
    assert len(said) == 2
    assert said[1].startswith("They have no room")
    has_room(monkeypatch, 10 << 20)
    run = Run(config)
    assert pipeline.run_stage(run, "demonstrations")["episodes"] == 4
    # What is there needs no room once more, but for a file that is put together.
    needed, _ = demonstrations.room(run.dir / "data" / "demonstrations", [100, 50])
    assert needed == 0
    run.close()


# ---------------------------------------------------------------- a step ahead


@pytest.fixture
def windows(config):
    run = Run(config)
    pipeline.run_stage(run, "demonstrations")
    run.close()
    folder = run.dir / "data" / "demonstrations"
    return ActionWindows(read_episodes(folder)), ActionWindows(on_disk(folder, 64))


def test_a_reader_that_is_ahead_draws_the_same(windows):
    for begin in (0, 3):  # from the start, and resumed
        batches = [training.Batches(w, 4, 6, 7, "toy") for w in windows]
        for step in range(begin, 6):
            for shard in (1, 0):
                (g, a), (h, b) = (draw(step, shard) for draw in batches)
                assert torch.equal(g.get_state(), h.get_state())
                assert all(torch.equal(a[name], b[name]) for name in a)
                after = generator(7, "toy", step, shard)
                windows[0].sample(after, 4)
                assert torch.equal(g.get_state(), after.get_state())
        held, ahead = batches
        assert not held._ahead
        assert not ahead._ahead  # nothing is read that no step asks for


def test_what_the_reader_meets_is_said_by_the_step_that_wanted_it(windows):
    batches = training.Batches(windows[1], 4, 6, 7, "toy")
    batches(0, 0)
    for file in windows[1].images._files:
        file._facts = (0, 0)
    batches._ahead.clear()
    batches._ahead[1, 0] = batches._reader.submit(batches._draw, 1, 0)
    with pytest.raises(UserError, match="changed since"):
        batches(1, 0)
