"""Errors a user can mend, and the nearest name to a mistyped one.

A `UserError` reads on its own: what failed, what was expected, what was found and how to mend it.
The command line prints its text without a traceback; any other exception is a defect of ours and
keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message says what, expected, got and the mend."""


class NonFiniteError(UserError):
    """A NaN or infinity where none may be."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None where none is close."""
    pool = list(candidates)
    matches = difflib.get_close_matches(name, pool, n=1, cutoff=0.6)
    if matches:
        return matches[0]
    folded = {c.replace("-", "_").lower(): c for c in pool}
    matches = difflib.get_close_matches(name.replace("-", "_").lower(), folded, n=1, cutoff=0.5)
    return folded[matches[0]] if matches else None


def unknown(kind: str, name: str, candidates: Iterable[str]) -> UserError:
    """The error for an unknown name: says which are known and which is nearest.

    kind: what is named, such as "preset" or "config key".
    """
    pool = sorted(candidates)
    guess = nearest(name, pool)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return UserError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(pool)}.")


def read_error(path: Path | str, error: OSError) -> UserError:
    """The UserError for a failed read of the file `path`."""
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path} is a folder where a file belongs. Move it away, or rename it.")
    return UserError(f"Cannot read {path}: {error.strerror}. Check its permissions.")


def write_error(path: Path | str, error: Exception) -> UserError:
    """The UserError for a failed write to `path`: says how to mend a full disk."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error):
        return UserError(
            f"The disk that holds {path} is full. Nothing written before was lost: free some space "
            "and start again; the run goes on from its last checkpoint."
        )
    return UserError(
        f"Cannot write {path}: {error}. Check the folder's permissions, or choose another."
    )
