"""LIBERO's official asset files, fetched from where hf-libero 0.1.4 gets them, and found again.

The files lie in huggingface_hub's cache. A stamp in ours, written once all of them were verified,
says where and of which commit they are.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from worldenv.runtime import hub, places
from worldenv.runtime.errors import UserError, write_error

REPOSITORY = "lerobot/libero-assets"  # libero/libero/utils/download_utils.py, HF_ASSETS_REPO_ID
COMMAND = "worldenv-doctor --fetch-assets"
_declined = False


@dataclass(frozen=True)
class Fetched:
    """Where the files lie and what they are."""

    folder: str
    commit: str
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{REPOSITORY}@{self.commit[:12]}, {self.files} files, {self.bytes / 1e6:.0f} MB"


def fetch() -> Fetched:
    """Fetch what is not there yet, verify everything and stamp it. UserError as `hub.fetch`."""
    print(f"fetching {REPOSITORY}, LIBERO's official assets; whole files stay if interrupted")
    found = hub.fetch(REPOSITORY, kind="dataset")
    fetched = Fetched(str(found.folder), found.commit, found.files, found.bytes)
    stamp = _stamp()
    draft = stamp.with_name(f".{stamp.name}.{os.getpid()}.tmp")
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(fetched), indent=2) + "\n", encoding="utf-8")
        os.replace(draft, stamp)
    except OSError as error:
        raise write_error(stamp, error) from error
    finally:
        draft.unlink(missing_ok=True)
    return fetched


def at_hand() -> Fetched | None:
    """What `fetch` left, unless it or its stamp has gone since."""
    try:
        fetched = Fetched(**json.loads(_stamp().read_text(encoding="utf-8")))
        return fetched if Path(fetched.folder).is_dir() else None
    except (OSError, ValueError, TypeError):
        return None


def offered(why: str) -> Fetched | None:
    """Asks on a terminal whether to fetch them, once, and does. None without a terminal, in CI,
    offline, and where the answer is no."""
    global _declined
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if _declined or not terminal or os.environ.get("CI") or hub.is_offline():
        return None
    try:
        answer = input(f"{why}. Fetch {REPOSITORY} from the hub now? [y/N] ")
    except EOFError:
        answer = ""
    _declined = answer.strip().lower() not in ("y", "yes")
    return None if _declined else fetch()


def required(suite: str, otherwise: str) -> Fetched:
    """The files, fetched now if a user wants it so. UserError otherwise.

    otherwise: what else can be done, for the message.
    """
    why = f"{suite} needs LIBERO's official asset files, and they have not been fetched"
    fetched = at_hand() or offered(why)
    if fetched is None:
        raise UserError(f"{why}. Fetch them with `{COMMAND}`, {otherwise}")
    return fetched


def _stamp() -> Path:
    return places.cache_dir() / "libero-assets.json"
