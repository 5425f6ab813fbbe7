"""The hub of models and data sets: huggingface.co, or what HF_ENDPOINT names, by huggingface_hub.

What is fetched lies in that library's own cache (HF_HOME), so that a second fetch goes on where one
ended; no file is there before it is whole. Every file is compared with the hash that the hub tells,
every wait has an end, HF_HUB_OFFLINE is respected, and nothing is unpickled.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Literal

from worldenv.runtime.errors import UserError

Kind = Literal["model", "dataset"]
MODEL = ("model.safetensors", "config.json", "results.json", "README.md")
"""Files of a model that worldenv-push writes, and all that is fetched of one."""
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"}
TIMEOUT = 20.0  # seconds without a word; huggingface_hub asks up to six times, then it ends
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?")


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository as they were at one commit."""

    folder: Path
    commit: str
    files: int
    bytes: int


def parse(word: str) -> tuple[str, str | None] | None:
    """Name and revision (a branch, a tag, a commit) of `user/name` or `user/name@revision`."""
    found = _NAME.fullmatch(word)
    return found and (found[1], found[2])


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    from huggingface_hub import constants  # it takes a moment, which most commands can spare

    return constants.HF_HUB_OFFLINE


def fetch(
    name: str, revision: str | None = None, kind: Kind = "model", only: Sequence[str] = ()
) -> Snapshot:
    """Bring a repository's files (only: those of these names, the first for sure) into the
    cache, and verify them.

    Raises UserError for an unknown repository or revision, a hub that stalls or refuses, a file
    that is not what the hub says (it is removed), and, offline, for what is not in the cache.
    """
    hub = _library()
    what = f"{name}@{revision}" if revision else name
    options = {"repo_type": kind, "revision": revision, "allow_patterns": list(only) or None}
    with _told(what, kind):
        if is_offline():
            return _snapshot(Path(hub.snapshot_download(name, **options, local_files_only=True)))
        api = hub.HfApi(library_name="worldenv")
        about = api.repo_info(name, repo_type=kind, revision=revision)
        _check_held(what, {file.rfilename for file in about.siblings}, only)
        folder = Path(hub.snapshot_download(name, **options))
        report = api.verify_repo_checksums(name, repo_type=kind, revision=folder.name)
        absent = [p for p in report.missing_paths if not only or p in only]
        _check_whole(what, folder, report.mismatches, absent)
    return _snapshot(folder)


def push(folder: Path, name: str, kind: Kind, private: bool, message: str) -> str:
    """Make all files of `folder` one commit of a repository, made (private or not) if there is
    none. Returns where it can be seen. UserError as in `fetch`, and without a token."""
    hub = _library()
    with _told(name, kind, writes=True):
        if is_offline():
            raise UserError(f"{name}: HF_HUB_OFFLINE is set. Unset it to send anything.")
        if not hub.get_token():
            raise UserError(
                f"{name}: expected a token that may write, got none. Make one in the hub's "
                "settings, then run `hf auth login`, or set HF_TOKEN."
            )
        api = hub.HfApi(library_name="worldenv")
        api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=name, repo_type=kind, folder_path=folder, commit_message=message
        )
    return f"{sent.commit_url}"


def checkpoint_in(folder: Path) -> Path:
    """The one file of weights of a folder that worldenv wrote. UserError if there is none."""
    _check_held(str(folder), {file.name for file in folder.iterdir()}, MODEL)
    return folder / MODEL[0]


def _check_held(what: str, held: set[str], only: Sequence[str]) -> None:
    """UserError unless the first of the files wanted is there; it names pickles that are."""
    if not only or only[0] in held:
        return
    pickles = sorted(n for n in held if PurePosixPath(n).suffix in PICKLES)
    got = f"pickles ({', '.join(pickles[:3])}), which are never opened" if pickles else "none"
    raise UserError(
        f"{what}: expected {only[0]}, as worldenv-push writes it, got {got}. Name another."
    )


def _snapshot(folder: Path) -> Snapshot:
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    return Snapshot(folder, folder.name, len(sizes), sum(sizes))


def _check_whole(what: str, folder: Path, wrong: list[Any], absent: list[str]) -> None:
    """Removes the `wrong` files of a snapshot. UserError that names them, or those that lack."""
    for file in (folder / found["path"] for found in wrong):
        file.resolve().unlink()  # in the cache the snapshot's files are links
        file.unlink(missing_ok=True)
    bad = [f"{f['path']} (expected {f['expected'][:12]}, got {f['actual'][:12]})" for f in wrong]
    bad += [f"{path} (missing)" for path in absent]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{what}: files are not what the hub says: {', '.join(bad[:3])}{more}. They were "
            "removed; run the same command again, which fetches only them."
        )


@cache
def _library() -> ModuleType:
    """huggingface_hub, imported where it is used, and bounded: of its requests several wait for an
    answer for ever, others for six minutes."""
    import huggingface_hub as hub

    session = hub.get_session()

    def bound(request: Any) -> None:
        given = request.extensions.get("timeout") or {}
        steps = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {
            step: TIMEOUT if given.get(step) is None else min(given[step], TIMEOUT)
            for step in steps
        }

    hooks = {"request": [*session.event_hooks["request"], bound]}
    hub.set_client_factory(lambda: type(session)(event_hooks=hooks, follow_redirects=True))
    return hub


def _http() -> ModuleType:
    """What the library speaks through: httpx, or httpx2 since its version 2."""
    return sys.modules[type(_library().get_session()).__module__.partition(".")[0]]


@contextmanager
def _told(what: str, kind: Kind, writes: bool = False) -> Iterator[None]:
    """The library's exceptions as errors that a user can mend."""
    from huggingface_hub import errors

    endpoint = _library().HfApi().endpoint
    word = "data set" if kind == "dataset" else "model"
    access = "if it is private or asks for consent, log in (`hf auth login`, or HF_TOKEN)"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{what}: {endpoint} asks for consent first: {access}.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: {endpoint} knows no such {word}. Correct the name (user/name@revision); "
            f"{access}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{what}: {endpoint} has this {word}, but no such revision. Name a branch, a tag or a "
            "commit of it, or leave out what follows the @."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if not is_offline():
            raise _unreachable(what, endpoint, error) from error
        raise UserError(
            f"{what}: HF_HUB_OFFLINE is set, and the cache ({_cache()}) does not hold it whole. "
            "Unset HF_HUB_OFFLINE once to fetch it, or set HF_HOME to the folder that has it."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        mend = "Try again later."
        if status in (401, 403):
            mend = "Log in (`hf auth login`, or HF_TOKEN) with a token that may "
            mend += "write there." if writes else "read it."
        raise UserError(f"{what}: {endpoint} refused: {_line(error)}. {mend}") from error
    except errors.HFValidationError as error:
        raise UserError(f"{what}: expected user/name, got {_line(error)}") from error
    except _http().HTTPError as error:
        raise _unreachable(what, endpoint, error) from error
    except OSError as error:
        raise UserError(
            f"{what}: could not be fetched into {_cache()}: {_line(error)}. What has arrived stays "
            "there; mend this (free some space, or set HF_HOME to another folder) and run the same "
            "command again."
        ) from error


def _unreachable(what: str, endpoint: str, error: Exception) -> UserError:
    return UserError(
        f"{what}: {endpoint} does not answer ({_line(error)}). Whole files that have arrived stay "
        "in the cache: run the same command again when it does. What is in the cache already is "
        "used without the hub with HF_HUB_OFFLINE=1."
    )


def _line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0].rstrip(": .")


def _cache() -> str:
    from huggingface_hub import constants

    return os.fspath(constants.HF_HUB_CACHE)
