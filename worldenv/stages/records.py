"""What is finished in a run folder, what is under way, and what stands aside.

    stages/<name>.json               finished: its fingerprint, and what was made by digest
    stages/<name>.unfinished.json    begun: from now on no record is valid
    aside/<name>-<fingerprint>/...   the same paths, as another configuration left them

Nothing is deleted when a configuration changes: what the old one made or began moves aside, and
comes back when it does. Whatever moment a process is killed at, the next one finishes the move.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from worldenv.runtime import device as devices
from worldenv.runtime import ranks
from worldenv.runtime.errors import read_error, write_error
from worldenv.runtime.logging import read_metrics
from worldenv.stages.run import Run, Step, read_record, write_record

_DATA = (".hdf5", ".h5", ".safetensors", ".pt", ".json")  # of folders that stages make


def perform(run: Run, step: Step, mark: str) -> dict:
    """The record of `step` under the fingerprint `mark`: as it stands, brought back, or by doing
    the step's work.
    """
    record = ranks.together(lambda: settle(run, step, mark))
    if record is not None:
        if "adopted" in record:
            print(f"{step.name}: adopted from {record['adopted']}, skipped")
        else:
            print(f"{step.name}: done in an earlier run ({record['seconds']:.0f} s), skipped")
        return record
    begun = time.perf_counter()
    try:
        with devices.PeakMemory(run.device) as memory:
            record = step.stage.work(run, mark, step.number)
    except BaseException:
        if ranks.lead():
            _begin(run, step, mark, _spent(run, step, mark) + time.perf_counter() - begun)
        raise
    devices.give_back()
    record |= memory.peaks()  # of rank 0
    seconds = time.perf_counter() - begun
    return ranks.together(lambda: finish(run, step, mark, record, seconds))


def settle(run: Run, step: Step, mark: str) -> dict | None:
    """Have in place what was made or begun under `mark`, and nothing else of this step.

    Returns the record of finished work that is whole. None: there is no valid record any more, and
    work can begin or go on.
    """
    note = _unfinished(run.dir, step)
    record = finished(run.dir, step, mark)
    if record is not None:
        note.unlink(missing_ok=True)
        return record
    holder = _holder(run.dir, step)
    if holder not in (None, mark):
        _put_aside(run, step, holder)
    if _aside(run.dir, step, mark).exists():
        _bring_back(run, step, mark)
        record = finished(run.dir, step, mark)
        if record is not None:
            note.unlink(missing_ok=True)
            return record
    _begin(run, step, mark, _spent(run, step, mark))
    path = _record(run.dir, step)
    record = read_record(path)
    if record is not None:
        for changed in changes(run.dir, step, record):
            print(f"{step.name}: {run.dir / changed} is not what the stage made: done again")
            if (run.dir / changed).exists():
                _move(run, step, changed, run.dir, _free(run.dir, step))
    path.unlink(missing_ok=True)
    return None


def finish(run: Run, step: Step, mark: str, record: dict, seconds: float) -> dict:
    """Record work that is done: what `work` returned, with its time, fingerprint and artifacts."""
    record = {
        **record,
        "seconds": round(_spent(run, step, mark) + seconds, 2),
        "fingerprint": mark,
        "artifacts": {path: _digest(run.dir / path) for path in _files(run.dir, step)},
    }
    write_record(run.path("stages", f"{step.name}.json"), record)
    _unfinished(run.dir, step).unlink(missing_ok=True)
    return record


def finished(folder: Path, step: Step, mark: str) -> dict | None:
    """The record of `step`, if it is of this fingerprint and all that it names is as it was."""
    record = read_record(_record(folder, step))
    if record is None or record["fingerprint"] != mark or changes(folder, step, record):
        return None
    return record


def at_hand(folder: Path, step: Step, mark: str) -> bool:
    """Whether `step` is finished under this fingerprint, in place or aside."""
    return any(finished(base, step, mark) for base in (folder, _aside(folder, step, mark)))


def foreign(folder: Path, step: Step, mark: str) -> bool:
    """Whether `step` was finished with other settings."""
    record = read_record(_record(folder, step))
    return record is not None and record["fingerprint"] != mark


def standing(folder: Path, step: Step, mark: str) -> str:
    """Why `step` is not finished, in words."""
    record = read_record(_record(folder, step))
    if record is None:
        begun = _unfinished(folder, step).exists()
        return "was interrupted" if begun else "has not run"
    if foreign(folder, step, mark):
        return "was made with other settings"
    return f"made {', '.join(changes(folder, step, record))}, which is gone or changed"


def changes(folder: Path, step: Step, record: dict) -> list[str]:
    """Artifacts that are gone, changed or new since the record was written."""
    known, found = record["artifacts"], _files(folder, step)
    return [
        path
        for path in sorted({*known, *found})
        if path not in known
        or path not in found
        or (
            known[path]["stat"] != _stat(folder / path)
            and known[path]["sha256"] != sha256(folder / path)
        )
    ]


def sha256(path: Path) -> str:
    """Of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise read_error(path, error) from error


# ---------------------------------------------------------------- what lies where


def _record(folder: Path, step: Step) -> Path:
    return folder / "stages" / f"{step.name}.json"


def _unfinished(folder: Path, step: Step) -> Path:
    return folder / "stages" / f"{step.name}.unfinished.json"


def _aside(folder: Path, step: Step, mark: str) -> Path:
    return folder / "aside" / f"{step.name}-{mark}"


def _free(folder: Path, step: Step) -> Path:
    """A new folder aside, for what no record names."""
    number = 1
    while (path := _aside(folder, step, f"changed-{number}")).exists():
        number += 1
    return path


def _files(folder: Path, step: Step) -> list[str]:
    """Artifacts that are there, relative to the folder."""
    found: list[Path] = []
    for made in (folder / path for path in step.makes):
        if made.is_dir():
            found += (p for p in made.rglob("*") if p.suffix.lower() in _DATA and p.is_file())
        elif made.is_file():
            found.append(made)
    return sorted(str(path.relative_to(folder)) for path in found)


def _owned(folder: Path, step: Step) -> Iterator[str]:
    """All of a step that is there, its record first and the note that it has begun last."""
    checkpoints = [f"checkpoints/{log}.*.safetensors" for log in step.logs]
    boards = [f"tensorboard/{log}" for log in step.logs]
    for pattern in (
        f"stages/{step.name}.json",
        *step.makes,
        *step.stage.keeps,
        *checkpoints,
        *boards,
        f"stages/{step.name}.unfinished.json",
    ):
        yield from sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))


def _stat(path: Path) -> list[int]:
    """Changes whenever the file does: nobody can set the time of its last change."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _digest(path: Path) -> dict:
    before = _stat(path)
    return {"sha256": sha256(path), "stat": before}


def _holder(folder: Path, step: Step) -> str | None:
    """Under which fingerprint what is in place was made or begun; None where nothing says so."""
    for path in (_record(folder, step), _unfinished(folder, step)):
        try:
            mark = json.loads(path.read_bytes())["fingerprint"]
            if re.fullmatch(r"[0-9a-f]{16}", mark):
                return mark
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return None


def _begin(run: Run, step: Step, mark: str, seconds: float) -> None:
    """Note that work under `mark` has begun, and how long it took so far."""
    path = run.path("stages", f"{step.name}.unfinished.json")
    write_record(path, {"fingerprint": mark, "seconds": seconds})


def _spent(run: Run, step: Step, mark: str) -> float:
    """Seconds that interrupted attempts under `mark` took."""
    stored = read_record(_unfinished(run.dir, step))
    return stored["seconds"] if stored is not None and stored["fingerprint"] == mark else 0.0


# ---------------------------------------------------------------- moving


def _put_aside(run: Run, step: Step, mark: str) -> None:
    """Move all that was made or begun under `mark` aside; the record goes first."""
    aside = _aside(run.dir, step, mark)
    if read_record(_unfinished(run.dir, step)) is None:
        _begin(run, step, mark, 0.0)
    print(f"{step.name}: what was made with other settings is kept in {aside}")
    moved_metrics = False
    for path in list(_owned(run.dir, step)):
        if path != f"stages/{step.name}.json" and not moved_metrics:
            _metrics_aside(run, step, aside)
            moved_metrics = True
        _move(run, step, path, run.dir, aside)


def _bring_back(run: Run, step: Step, mark: str) -> None:
    """Move all that stands aside under `mark` back; the record comes last."""
    aside = _aside(run.dir, step, mark)
    _begin(run, step, mark, _spent(run, step, mark))
    print(f"{step.name}: what was made with these settings comes back from {aside}")
    if (aside / "metrics.jsonl").exists():
        run.logger.restore(step.logs, read_metrics(aside))
        (aside / "metrics.jsonl").unlink()
    for path in reversed(list(_owned(aside, step))):
        _move(run, step, path, aside, run.dir)
    if not any(path.is_file() for path in aside.rglob("*")):
        shutil.rmtree(aside)


def _move(run: Run, step: Step, path: str, source: Path, target: Path) -> None:
    """Move `path` from one folder to the other; what is there already is moved out of its way."""
    goal = target / path
    if goal.exists() and goal != _unfinished(target, step):
        _move(run, step, path, target, _free(run.dir, step))
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / path, goal)  # a rename, unless a link leads to another disk
    except OSError as error:
        raise write_error(goal, error) from error


def _metrics_aside(run: Run, step: Step, aside: Path) -> None:
    rows = [row for row in read_metrics(run.dir) if row["stage"] in step.logs]
    if not rows:
        return
    path, draft = aside / "metrics.jsonl", aside / ".metrics.jsonl.tmp"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        draft.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    run.logger.restore(step.logs, [])
