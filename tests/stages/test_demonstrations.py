"""--data: demonstrations from files, and what is checked before work begins."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from official_files import write_official

from worldenv.config import Config, DataConfig
from worldenv.data.episodes import read_episodes
from worldenv.data.libero_tasks import SUITES
from worldenv.fields import from_dict, to_dict
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import demonstrations, pipeline
from worldenv.stages.run import Run


def configured(folder, suite="libero_goal", tasks=(7,), **data) -> Config:
    base = preset("smoke")
    return replace(
        base,
        run_dir=folder / "run",
        env=replace(base.env, suite=suite, tasks=tasks),
        data=DataConfig(paths=(folder / "files",), **data),
    )


def official(folder, suite, task, name=None, **options):
    stem = name or SUITES[suite][task]
    path = folder / "files" / suite / f"{stem}_demo.hdf5"
    write_official(path, size=64, **options)
    return path


def taken(config) -> list:
    run = Run(config)
    try:
        pipeline.run_stage(run, "demonstrations")
    finally:
        run.close()
    return read_episodes(run.dir / "data" / "demonstrations")


@pytest.mark.parametrize("convention", ["before", "after"])
def test_files_replace_scripted_demonstrations(tmp_path, capsys, convention):
    official(tmp_path, "libero_goal", 7, demos=3, steps=40, convention=convention)
    official(tmp_path, "libero_goal", 1, demos=2, steps=40)
    official(tmp_path, "libero_10", 2, demos=1)
    episodes = taken(configured(tmp_path, tasks=(7, 1), episodes=2))
    assert sorted(e.task for e in episodes) == [1, 1, 7, 7]
    assert {e.suite for e in episodes} == {"libero_goal"}
    # The benchmark's words, not the file's: what the environment will say.
    words = {e.task: e.instruction for e in episodes}
    assert words == {7: "turn on the stove", 1: "put the bowl on the stove"}
    assert all(e.success for e in episodes)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data:")]
    assert len(lines) == (2 if convention == "before" else 1)
    assert f"obs {convention} each action (measured by states)" in "".join(lines)
    assert "images raw (measured by motion)" in "".join(lines)


def test_tasks_are_found_by_what_files_say(tmp_path):
    for name, attribute, value in (
        ("first", "bddl_file_name", "chiliocosm/bddl_files/libero_goal/turn_on_the_stove.bddl"),
        ("second", "problem_info", '{"language_instruction": "Put the bowl on the stove"}'),
        (
            "third",
            "problem_info",
            '{"language_instruction": "Open the middle layer of the drawer"}',
        ),
    ):
        with h5py.File(official(tmp_path, "libero_goal", 0, name), "a") as file:
            file["data"].attrs[attribute] = value
    found = demonstrations.survey(configured(tmp_path, tasks=(7, 1, 0)))
    assert {task: files[0].name for task, files in found.items()} == {
        7: "first_demo.hdf5", 1: "second_demo.hdf5", 0: "third_demo.hdf5",
    }  # fmt: skip


def test_tasks_without_demonstrations_are_named(tmp_path):
    official(tmp_path, "libero_goal", 7)
    official(tmp_path, "libero_10", 2)
    with pytest.raises(UserError, match=r"got none of libero_goal task 1 \(put the bowl on the st"):
        taken(configured(tmp_path, tasks=(7, 1)))
    with pytest.raises(UserError, match="1 of libero_10 task 2, 1 of libero_goal task 7"):
        taken(configured(tmp_path, tasks=(1,)))
    (tmp_path / "none").mkdir()
    for place, words in (("none", "none in the folder"), ("gone", "no such file")):
        config = replace(configured(tmp_path), data=DataConfig(paths=(tmp_path / place,)))
        with pytest.raises(UserError, match=f"--data .*{place}.*{words}"):
            taken(config)


def test_failed_demonstrations_are_left_out(tmp_path, capsys):
    path = official(tmp_path, "libero_goal", 7, demos=3)
    with h5py.File(path, "a") as file:
        for name in ("demo_0", "demo_1"):
            del file[f"data/{name}/dones"], file[f"data/{name}/rewards"]
            file[f"data/{name}/dones"] = np.zeros(24, np.uint8)
            file[f"data/{name}/rewards"] = np.eye(24)[-1] * (name == "demo_1")
    assert len(taken(configured(tmp_path))) == 2  # one said so by its reward
    assert "2 demonstrations of 1 task(s) from 1 file(s)" in (out := capsys.readouterr().out)
    assert "1 failed, left out" in out
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["dones"][...], demo["rewards"][...] = 0, 0
    with pytest.raises(UserError, match="demonstrations of libero_goal task 7 that succeed, got"):
        taken(replace(configured(tmp_path), run_dir=tmp_path / "other"))


def test_no_ops_are_kept_or_dropped(tmp_path, capsys):
    path = official(tmp_path, "libero_goal", 7)
    with h5py.File(path, "a") as file:
        actions = file["data/demo_0/actions"]
        actions[5:8, :6] = 0
    assert [len(e) for e in taken(configured(tmp_path))] == [23]
    dropped = replace(configured(tmp_path, no_ops="drop"), run_dir=tmp_path / "other")
    assert [len(e) for e in taken(dropped)] == [20]
    assert "3 of 23 actions were no-ops, dropped" in capsys.readouterr().out


def test_any_size_is_brought_to_the_runs(tmp_path, capsys):
    path = official(tmp_path, "libero_goal", 7)
    write_official(path, size=112)
    config = configured(tmp_path)
    assert taken(config)[0].images.shape[2:] == (64, 64, 3)
    assert "112 px averaged to 64" in capsys.readouterr().out


def test_an_interrupted_copy_goes_on(tmp_path, monkeypatch):
    official(tmp_path, "libero_goal", 7, demos=3)
    config, append = configured(tmp_path), demonstrations.DatasetWriter.append
    count = 0

    def stop_after_two(self, episode):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        append(self, episode)

    with monkeypatch.context() as patch:
        patch.setattr(demonstrations.DatasetWriter, "append", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            taken(config)
    whole = taken(replace(config, run_dir=tmp_path / "whole"))
    resumed = taken(config)
    assert len(resumed) == 3
    for a, b in zip(resumed, whole, strict=True):
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.actions, b.actions)


def test_other_files_are_another_stage(tmp_path):
    path = official(tmp_path, "libero_goal", 7)
    config = configured(tmp_path)
    before = demonstrations.identity(config)
    assert demonstrations.identity(config) == before
    assert demonstrations.identity(configured(tmp_path, no_ops="drop")) != before
    write_official(path, size=64, demos=2)
    assert demonstrations.identity(config) != before


def test_a_suite_without_an_expert_names_the_flag_before_work_begins(tmp_path):
    config = replace(configured(tmp_path), data=DataConfig())
    run = Run(config)
    for work in (pipeline.run_all, lambda run: pipeline.run_stage(run, "demonstrations")):
        with pytest.raises(
            UserError, match=r"libero_goal: expected demonstration files.*--data PA"
        ):
            work(run)
    run.close()


def test_missing_assets_are_named_before_work_begins(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLDENV_LIBERO_ASSETS", raising=False)
    official(tmp_path, "libero_goal", 7)
    run = Run(configured(tmp_path))
    with pytest.raises(UserError, match=r"libero_goal needs LIBERO's official asset files.*Fetch "):
        pipeline.run_all(run)
    assert not (run.dir / "data").exists()
    run.close()


def test_the_configuration_survives_its_file():
    config = Config(data=DataConfig(paths=("a", "b/c.hdf5"), episodes=3, no_ops="drop"))
    assert from_dict(Config, to_dict(config)).data.paths[1].name == "c.hdf5"
