"""What is finished, what is not, and what happens to it when the configuration changes and comes
back. The stages are toys (toy.py): everything around them is real.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from toy import NAMES, Toy, makes

from worldenv import cli
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.runtime.lock import FolderLock
from worldenv.stages import pipeline, records
from worldenv.stages.run import Run

ARTIFACTS = [
    path + ("/a.hdf5" if path.startswith("data/") else "")
    for step in pipeline.steps(preset("smoke")).values()
    for path in makes(step)
]


class Killed(BaseException):
    pass


@pytest.fixture
def toy(tmp_path, monkeypatch):
    return Toy(tmp_path / "run", monkeypatch)


def maker(path: str) -> str:
    """Name of the step that makes an artifact."""
    steps = pipeline.steps(preset("smoke"))
    return next(name for name, s in steps.items() for made in s.makes if path.startswith(made))


def test_a_finished_run_is_skipped_and_another_round_repeats_none(toy):
    assert toy.run(posttrain__rounds=1) == [*NAMES[:7], "evaluate"]
    assert toy.run(posttrain__rounds=1) == []
    assert toy.run() == list(NAMES[7:])
    assert toy.run() == []
    assert toy.run(simulator__lr=0.1) == [
        name for name in NAMES if name not in ("demonstrations", "sft", "explore-0")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_after_other_settings_are_interrupted_the_right_ones_find_all_as_it_was(toy, name):
    toy.run()
    before = toy.state()
    toy.interrupt(name, seed=5)
    assert f"stages/{name}.json" not in toy.state()
    assert toy.run() == []
    assert toy.state() == before
    # And the other settings go on from where they were interrupted, theirs not lost either.
    assert toy.run(seed=5) == list(NAMES[NAMES.index(name) :])
    record = json.loads((toy.folder / "stages" / f"{name}.json").read_text())
    assert record["went_on"]
    assert toy.run() == []
    assert toy.state() == before


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("posttrain", {"posttrain__lr": 1e-3}),
        ("explore", {"collect__push": 0.1}),
        ("demonstrations", {"seed": 5}),
    ],
)
def test_one_stage_interrupted_under_other_settings_is_no_longer_done_with_them(
    toy, stage, changes
):
    toy.run()
    before = toy.state()
    name = stage if stage in NAMES else f"{stage}-0"
    toy.interrupt(name, stage, **changes)
    assert toy.run(stage) == []  # brought back, not "done" over what the other left
    assert toy.state() == before


def test_a_stage_alone_brings_back_what_it_reads(toy):
    toy.run()
    toy.interrupt("explore-0", "explore", collect__push=0.1)
    assert toy.run("simulator") == []
    (toy.folder / "stages" / "simulator-0.json").unlink()
    toy.interrupt("explore-0", "explore", collect__push=0.1)
    assert toy.run("simulator") == ["simulator-0"]
    assert toy.run() == []


@pytest.mark.parametrize("how", ["delete", "truncate", "replace"])
@pytest.mark.parametrize("path", ARTIFACTS)
def test_an_artifact_that_is_gone_or_changed_is_made_again(toy, path, how):
    toy.run()
    before = toy.state()
    file = toy.folder / path
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(file.read_bytes()[:10])
    else:  # nothing but the content tells
        stat = file.stat()
        file.write_bytes(b"x" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = file.read_bytes() if file.exists() else None
    assert toy.run() == [maker(path)]
    assert toy.state() == before
    kept = toy.folder / "aside" / f"{maker(path)}-changed-1" / path
    assert (kept.read_bytes() if kept.exists() else None) == changed
    assert toy.run() == []


def test_a_file_that_joins_the_data_is_noticed(toy):
    toy.run()
    (toy.folder / "data/explore-0/foreign.hdf5").write_text("of another run")
    with pytest.raises(UserError, match=r"explore-0 \(.*foreign\.hdf5"):
        toy.run("reflector")
    assert toy.run("explore") == ["explore-0"]
    assert (toy.folder / "aside/explore-0-changed-1/data/explore-0/foreign.hdf5").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_repair_is_not_done(toy, name):
    toy.run()
    before = toy.state()
    for path in makes(toy.steps()[name]):
        path = path + "/a.hdf5" if path.startswith("data/") else path
        (toy.folder / path).unlink()
    if not toy.steps()[name].makes:
        (toy.folder / "stages" / f"{name}.json").unlink()
    toy.interrupt(name)
    assert not (toy.folder / "stages" / f"{name}.json").exists()
    assert toy.run() == [name]
    assert toy.state() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"text"', b"\xff\xfe", b"{}", b"[" * 100_000, None],
    ids=range(10),
)
@pytest.mark.parametrize("name", ["explore-0", "evaluate"])
def test_a_broken_record_is_made_again(toy, name, content, capsys):
    toy.run()
    before = toy.state()
    path = toy.folder / "stages" / f"{name}.json"
    if content is None:
        record = json.loads(path.read_text())
        del record["seconds"]
        content = json.dumps(record).encode()
    path.write_bytes(content)
    assert toy.run() == [name]
    assert toy.state() == before
    assert f"{path} is not as worldenv wrote it" in capsys.readouterr().out


def test_another_stages_record_is_not_taken_for_one(toy):
    toy.run()
    folder = toy.folder / "stages"
    (folder / "sft.json").write_bytes((folder / "evaluate.json").read_bytes())
    (folder / "sft.unfinished.json").write_bytes(b"[1]")
    assert toy.run() == ["sft"]


def kill_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """The process dies at its count-th move."""
    move = records.shutil.move
    left = [count]

    def moved(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return move(*arguments)

    patch.setattr(records.shutil, "move", moved)


@pytest.mark.parametrize("coming_back", [False, True])
def test_a_kill_in_the_middle_of_a_move_loses_nothing(toy, coming_back):
    toy.run(posttrain__rounds=1)
    first = toy.state()
    toy.run(posttrain__rounds=1, seed=5)
    second = toy.state()
    toy.run(posttrain__rounds=1)
    for count in range(200):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, count)
            try:
                toy.run(posttrain__rounds=1, seed=5)
                break
            except Killed:
                pass
        if coming_back:
            toy.run(posttrain__rounds=1)
            assert toy.done == []
            assert toy.state() == first
    else:
        pytest.fail("never got through")
    assert count > 8
    assert toy.done == []
    assert toy.state() == second
    assert not any("changed" in path for path in toy.everything())


def test_kills_at_every_move_of_a_fresh_change(tmp_path):
    for count in range(0, 30, 3):
        with pytest.MonkeyPatch.context() as patch:
            toy = Toy(tmp_path / str(count), patch)
            toy.run(posttrain__rounds=1)
            before = toy.state()
            with pytest.MonkeyPatch.context() as killer:
                kill_at(killer, count)
                with pytest.raises(Killed):
                    toy.run(posttrain__rounds=1, sft__lr=0.1, seed=5)
            assert toy.run(posttrain__rounds=1) == []
            assert toy.state() == before


@pytest.mark.parametrize(
    ("command", "changes", "named"),
    [
        (("posttrain",), {"seed": 5}, r"`worldenv-train demonstrations` first"),
        (("simulator",), {"collect__episodes": 30}, r"explore-0 \(was made with other settings\)"),
        (("evaluate",), {"posttrain__lr": 1e-3}, r"posttrain-0 \(was made with other settings\)"),
        (("report",), {"seed": 5}, r"demonstrations \(was made with other settings\)"),
        (("fidelity", 1), {"reflector__steps": 6}, r"`worldenv-train reflector` first"),
        (("report",), {"posttrain__rounds": 3}, r"explore-2 \(has not run\)"),
    ],
)
def test_a_stage_alone_refuses_what_other_settings_made(toy, command, changes, named):
    toy.run()
    before = toy.everything()
    with pytest.raises(UserError, match=named):
        toy.run(*command, **changes)
    assert toy.everything() == before
    assert toy.run() == []


def test_a_stage_alone_says_what_has_not_run_and_what_was_interrupted(toy):
    toy.interrupt("explore-0")
    with pytest.raises(
        UserError, match=r"explore-0 \(was interrupted\), simulator-0 \(has not run\)"
    ):
        toy.run("reflector")
    assert toy.run("explore") == ["explore-0"]
    assert toy.run("simulator") == ["simulator-0"]
    assert toy.run("reflector") == ["reflector-0"]


def test_an_interrupted_stage_counts_all_its_time(toy, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(clock))
    toy.interrupt("sft")
    toy.interrupt("sft")
    toy.run("sft")
    record = json.loads((toy.folder / "stages" / "sft.json").read_text())
    assert record["seconds"] == 30
    assert not (toy.folder / "stages" / "sft.unfinished.json").exists()


# ---------------------------------------------------------------- two runs in one folder


def test_a_second_run_in_the_folder_is_refused_and_changes_nothing(toy):
    toy.run()
    first = Run(toy.config())
    before = toy.everything()
    with pytest.raises(UserError, match=rf"another run is at work here \(process {os.getpid()} on"):
        toy.run(seed=5)
    assert toy.everything() == before
    first.close()
    assert toy.run() == []


def test_a_lock_dies_with_its_process(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from worldenv.runtime.lock import FolderLock;"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            FolderLock(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        FolderLock(tmp_path).release()
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize("script", ["evaluate", "imagine"])
def test_what_shows_a_run_refuses_what_the_run_did_not_make(toy, monkeypatch, script):
    """worldenv-eval and -imagine took whatever lay in the folder for the run's."""
    toy.run()
    loaded = []

    class Loaded(Exception):
        pass

    def load(kind, path, *_, **__):
        loaded.append(path.name)
        raise Loaded

    monkeypatch.setattr(cli.store, "load", load)
    monkeypatch.setattr(cli.sys, "argv", [script, "--run-dir", str(toy.folder)])
    show = getattr(cli, f"_{script}")
    last = toy.config().posttrain.rounds - 1
    used = {"evaluate": f"posttrain-{last}", "imagine": f"reflector-{last}"}[script]
    with pytest.raises(Loaded):
        show()
    (made,) = (p for p in toy.steps()[used].makes if p.endswith(".safetensors"))
    toy.interrupt("simulator-0", "all", seed=5)
    with pytest.raises(UserError, match=f"{last} in .* was made with other settings"):
        show()
    assert toy.run() == []
    with pytest.raises(Loaded):
        show()
    whole = (toy.folder / made).read_bytes()
    (toy.folder / made).write_bytes(whole[:-1] + b"?")
    with pytest.raises(UserError, match=f"{used} in .* {made}, which is gone or changed"):
        show()
    if script == "evaluate":  # a named file is what the user says it is
        cli.sys.argv += ["--policy", str(toy.folder / made)]
        with pytest.raises(Loaded):
            show()
    assert len(loaded) == 2 + (script == "evaluate")
