"""A program in a process of its own, forked so that nothing is imported again, for tests."""

import multiprocessing
import os
import sys
from typing import TextIO

import torch._dynamo  # noqa: F401 - any optimiser does, which takes seconds

from worldenv.runtime import parallel


class Forked:
    """`code` run as a script with these arguments; what it prints can be read as it comes."""

    def __init__(self, code: str, *arguments: str) -> None:
        (out, out_end), (errors, errors_end) = os.pipe(), os.pipe()
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_run, args=(code, arguments, out_end, errors_end))
        self._process.start()
        os.close(out_end), os.close(errors_end)
        self.pid: int = self._process.pid
        self.stdout: TextIO = os.fdopen(out)
        self._errors: TextIO = os.fdopen(errors)

    def ended(self) -> tuple[int, str]:
        """Its exit status, minus the signal's number if one killed it, and all that it printed to
        standard error."""
        self._process.join(60)
        self._process.kill()
        self._process.join()
        with self.stdout, self._errors:
            return self._process.exitcode, self._errors.read()


def _run(code: str, arguments: tuple[str, ...], out: int, errors: int) -> None:
    os.dup2(out, 1), os.dup2(errors, 2)
    os.closerange(3, 256)  # the parent's: a pipe ends when nobody can write to it
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    sys.argv = ["-c", *arguments]
    parallel._pool, parallel._count = None, 0  # its threads are the parent's
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
