"""The folder for what is written outside run folders: by us, and by the libraries under us."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from worldenv.runtime.errors import UserError

CACHE_VARIABLE = "WORLDENV_CACHE"
_LIBRARIES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib", "TMPDIR": "tmp"}


def cache_dir() -> Path:
    """$WORLDENV_CACHE, else `worldenv` in the user's cache."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldenv"


def library_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` with every folder that libraries write to below our cache.

    Raises UserError if that folder cannot be written to.
    """
    folder = cache_dir() / "libraries"
    try:
        for name in _LIBRARIES.values():
            (folder / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder / name):
                pass
    except OSError as error:
        raise UserError(
            f"The libraries under worldenv need a folder to write to, and {folder} is not one: "
            f"{error}. Set {CACHE_VARIABLE} to a folder you may write to."
        ) from error
    return dict(base) | {key: str(folder.absolute() / name) for key, name in _LIBRARIES.items()}
