"""The metrics file: appended, rewound, repaired; and the guard against NaN."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from worldenv.runtime.errors import NonFiniteError, UserError
from worldenv.runtime.logging import RunLogger, check_finite, read_metrics


def _steps(run: Path, stage: str) -> list[int]:
    return [row["step"] for row in read_metrics(run, stage)]


def test_rows_are_flushed_and_plain(tmp_path: Path):
    logger = RunLogger(tmp_path / "run")
    logger.log(
        "sft",
        0,
        loss=torch.tensor(0.5),
        count=3,
        ok=True,
        name="x",
        ratio=float("nan"),
        curve=[1.0, float("inf")],
        scalar=np.float32(2.0),
        none=None,
    )
    row = read_metrics(tmp_path / "run")[0]  # before close: a kill loses nothing
    logger.close()
    assert row.pop("time") > 1e9
    assert row == {
        "stage": "sft",
        "step": 0,
        "loss": 0.5,
        "count": 3,
        "ok": True,
        "name": "x",
        "ratio": None,
        "curve": [1.0, None],
        "scalar": 2.0,
        "none": None,
    }
    with RunLogger(tmp_path / "other") as logger, pytest.raises(TypeError, match="'loss' is a set"):
        logger.log("sft", 0, loss={1})


def test_a_truncated_last_line_is_dropped(tmp_path: Path):
    with RunLogger(tmp_path) as logger:
        logger.log("sft", 0, loss=1.0)
        logger.log("sft", 1, loss=0.9)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert _steps(tmp_path, "sft") == [0]
    with RunLogger(tmp_path) as logger:
        logger.log("sft", 1, loss=0.8)
    assert [row["loss"] for row in read_metrics(tmp_path, "sft")] == [1.0, 0.8]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_rewind_forgets_only_that_stage_from_that_step(tmp_path: Path):
    with RunLogger(tmp_path) as logger:
        for step in range(5):
            logger.log("sft", step, loss=float(step))
        logger.log("posttrain", 4, reward=1.0)
    with RunLogger(tmp_path) as logger:
        logger.rewind("sft", 3)
        logger.log("sft", 3, loss=30.0)
        logger.rewind("posttrain", 5)
    assert [row["loss"] for row in read_metrics(tmp_path, "sft")] == [0.0, 1.0, 2.0, 30.0]
    assert _steps(tmp_path, "posttrain") == [4]
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_tensorboard_holds_the_curves_without_the_rewound_part(tmp_path: Path):
    with RunLogger(tmp_path) as logger:
        for step in range(4):
            logger.log("sft", step, loss=float(step))
    with RunLogger(tmp_path) as logger:
        logger.rewind("sft", 2)
        logger.log("sft", 2, loss=20.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_damage_elsewhere_is_reported_with_its_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "sft", "step": 0}\nrubbish\n{"stage": "sft", "step": 1}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)
    path.write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="line 1"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_full_disk_and_a_bad_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    logger = RunLogger(tmp_path)

    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logger, "_file", Full())
        with pytest.raises(UserError, match="is full"):
            logger.log("sft", 0, loss=1.0)
    logger.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        RunLogger(tmp_path / "file" / "run")


def test_check_finite_names_tensor_and_step():
    check_finite("loss", 1.0, 0)
    check_finite("loss", torch.ones(3, requires_grad=True), 0)
    bad = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])
    with pytest.raises(
        NonFiniteError, match=r"grad \[2, 2\] holds 1 NaN and 1 infinite of 4 .* step 17"
    ):
        check_finite("grad", bad, 17)
    with pytest.raises(NonFiniteError, match="loss"):
        check_finite("loss", float("-inf"), 3)
