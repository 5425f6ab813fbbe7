"""One process at a time in a folder, by a lock that the system lets go when its process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from worldenv.runtime.errors import UserError, write_error

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class FolderLock:
    """Holds `<folder>/.lock` until `release`, or until this process ends in whatever way.

    The folder is created if absent. Raises UserError, naming the holder, if another one has it, and
    if the folder cannot be written. Where the file system knows no locks, that is said and work
    goes on. (By hand: with `filelock` it takes as many lines, and a dependency.)
    """

    def __init__(self, folder: Path) -> None:
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            self.release()
            if error.errno in _HELD:
                raise UserError(
                    f"{folder}: another run is at work here ({holder or 'unnamed'}). Wait for it, "
                    "stop it, or choose another run_dir."
                ) from error
            print(f"{path}: no lock on this file system ({error}); start no second run here")
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
