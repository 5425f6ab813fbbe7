"""A finished run is finished, whatever becomes of its pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest

from worldenv.presets import preset
from worldenv.report.video import write_video
from worldenv.stages import results
from worldenv.stages.results import success_of
from worldenv.stages.run import Run, write_record

SUCCESS = {"sft": {"successes": 3, "episodes": 9}, "posttrained": {"successes": 6, "episodes": 9}}
FRAMES = np.zeros((4, 64, 64, 3), np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose stages are over, with one small video to draw."""
    run = Run(replace(preset("smoke"), run_dir=tmp_path / "run"))
    write_record(run.path("stages", "evaluate.json"), {"fingerprint": "f", "outcomes": {}})
    monkeypatch.setattr(results, "collect_results", lambda run, names: SUCCESS)
    monkeypatch.setattr(results, "_videos", lambda _, media: write_video(media / "x.mp4", FRAMES))
    yield run
    run.close()


def page_of(run):
    return (run.dir / "report.html").read_text()


def test_without_ffmpeg_a_finished_run_ends_well_and_says_what_is_missing(run, monkeypatch, capsys):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    path = results.report(run, [])
    assert json.loads(path.read_text()) == SUCCESS
    said = capsys.readouterr().err
    assert "not drawn: videos: " in said
    assert "/nowhere/ffmpeg" in said
    assert "Not drawn: videos: " in page_of(run)
    assert "67%" in page_of(run)
    # With ffmpeg back, the same command draws them.
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    results.report(run, [])
    assert capsys.readouterr().err == ""
    assert "Not drawn" not in page_of(run)
    assert page_of(run).count("data:video/mp4") == 1


def test_a_disk_that_fills_while_pictures_are_drawn_loses_no_results(run, capsys, largest_file):
    results.report(run, [])
    (run.dir / "results.json").unlink()
    with largest_file(2_000):
        path = results.report(run, [])
    assert json.loads(path.read_text()) == SUCCESS
    assert "not drawn: report.html: " in capsys.readouterr().err
    assert not list(run.dir.glob("*.tmp"))
    assert not (run.dir / "report.html").exists(), "a page of earlier results beside new ones"


def test_results_are_there_before_pictures_begin(run, monkeypatch):
    def stop(run, media):
        assert json.loads((run.dir / "results.json").read_text()) == SUCCESS
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "_videos", stop)
    with pytest.raises(KeyboardInterrupt):
        results.report(run, [])


def test_success_is_paired_and_clustered_by_start():
    rows = [{"task": 1, "start": s, "seed": k, "success": s == 3} for s in (2, 3) for k in (0, 1)]
    better = [{**row, "success": True} for row in rows]
    found = success_of({"sft": rows, "posttrained": better}, "success")
    assert found["sft"] == {"successes": 2, "episodes": 4}
    assert found["posttrained"] == {"successes": 4, "episodes": 4}
    assert found["paired_difference"] == {"mean": 0.5, "low": -1.0, "high": 1.0}
    alone = {label: found[:2] for label, found in (("sft", rows), ("posttrained", better))}
    assert success_of(alone, "success")["paired_difference"] is None
