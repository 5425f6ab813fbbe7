"""--data with LeRobotDatasets, alone and beside HDF5 files; and out again."""

from dataclasses import replace

import numpy as np
import pytest
from lerobot_files import edit_info, write_lerobot
from official_files import write_official

from worldenv.config import DataConfig
from worldenv.data.episodes import read_episodes
from worldenv.data.lerobot.layout import open_dataset
from worldenv.data.lerobot.reader import Reader
from worldenv.data.libero_tasks import SUITES
from worldenv.envs.libero.robot import embodiment
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import demonstrations, pipeline
from worldenv.stages.export import export
from worldenv.stages.run import Run


def configured(folder, tasks=(7, 1), **data):
    base = preset("smoke")
    return replace(
        base,
        run_dir=folder / "run",
        env=replace(base.env, suite="libero_goal", tasks=tasks),
        data=DataConfig(**{"paths": (folder / "files",), **data}),
    )


def taken(config) -> list:
    run = Run(config)
    try:
        pipeline.run_stage(run, "demonstrations")
    finally:
        run.close()
    return read_episodes(run.dir / "data" / "demonstrations")


@pytest.fixture
def mixture(tmp_path):
    """A data set of both tasks, a third task in words nobody knows, and a file of one task."""
    texts = ("turn on the stove", "Put the bowl on the stove", "öffne 抽屉")
    write_lerobot(tmp_path / "files/set", "v2.1", lengths=(40, 36, 44), size=64, texts=texts)
    path = tmp_path / f"files/libero_goal/{SUITES['libero_goal'][7]}_demo.hdf5"
    write_official(path, "before", demos=2, steps=40, size=128)
    return tmp_path


def test_a_mixture_replaces_scripted_demonstrations(mixture, capsys):
    episodes = taken(configured(mixture))
    assert sorted((e.task, len(e)) for e in episodes) == [(1, 36), (7, 40), (7, 40), (7, 40)]
    assert {e.images.shape[2] for e in episodes} == {64}
    words = {e.task: e.instruction for e in episodes}
    assert words == {7: "turn on the stove", 1: "put the bowl on the stove"}
    assert all(e.success and e.source == "demonstration" for e in episodes)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data:")]
    assert len(lines) == 2
    (said,) = [line for line in lines if "LeRobot v2.1" in line]
    assert "2 demonstrations of 2 task(s) 64 px; LeRobot v2.1; cameras" in said
    assert "no next.success: all taken for demonstrations that succeed" in said


def test_at_most_so_many_of_each_task(mixture):
    assert sorted(e.task for e in taken(configured(mixture, episodes=1))) == [1, 7]


def test_tasks_that_are_missing_are_named_with_what_is_there(mixture):
    with pytest.raises(UserError, match=r"got none of libero_goal task 3.*that say 'öffne 抽屉'"):
        taken(configured(mixture, tasks=(3,)))


def test_damage_is_found_before_work_begins(mixture):
    video = next((mixture / "files/set").rglob("*000001.mp4"))
    video.unlink()
    with pytest.raises(UserError, match=r"000001\.mp4: expected the video of observation"):
        demonstrations.survey(configured(mixture))
    demonstrations.survey(configured(mixture, tasks=(7,)))  # not of its episodes


def test_how_it_is_read_is_part_of_the_stage(mixture):
    config = configured(mixture)
    before = demonstrations.identity(config)
    assert demonstrations.identity(config) == before
    assert demonstrations.identity(configured(mixture, gripper="one-opens")) != before
    edit_info(mixture / "files/set", robot_type="another")
    assert demonstrations.identity(config) != before


def test_failures_are_left_out(tmp_path, capsys):
    won = iter((True, False, False))
    extra = {"next.success": lambda n: np.eye(n, dtype=bool)[-1] & next(won)}
    options = {"images": True, "size": 64, "texts": ("turn on the stove",), "extra": extra}
    write_lerobot(tmp_path / "files", "v3.0", **options)
    assert len(taken(configured(tmp_path, tasks=(7,)))) == 1
    assert "2 failed, left out" in capsys.readouterr().out


def test_what_is_exported_trains_as_its_source_does(mixture, tmp_path):
    out = tmp_path / "out"
    data = DataConfig(paths=(mixture / "files",))
    with pytest.raises(UserError, match="--image-size"):
        export(data, out)
    assert not out.exists()
    said = export(data, out, image_size=64)
    assert "LeRobotDataset v3.0 of 5 episodes (5 succeeded), 200 rows" in said
    found = list(Reader(open_dataset(out), embodiment(64)).read())
    assert sorted(e.task for e in found) == [-1, 1, 7, 7, 7]
    config = configured(tmp_path)
    direct = taken(config)
    through = taken(replace(config, run_dir=tmp_path / "other", data=DataConfig(paths=(out,))))
    assert len(direct) == 4
    for a, b in zip(direct, through, strict=True):
        assert np.array_equal(a.actions, b.actions)
        assert np.array_equal(a.proprio, b.proprio)
        assert np.abs(a.images.astype(int) - b.images).mean() < 2.0
    with pytest.raises(UserError, match="--data: expected files or folders"):
        export(DataConfig(), tmp_path / "none")
