"""Console scripts' first steps: be ready to be stopped, then import what takes seconds."""

from worldenv.runtime import signals


def train() -> None:
    """worldenv-train"""
    _start("train")


def evaluate() -> None:
    """worldenv-eval"""
    _start("evaluate")


def collect() -> None:
    """worldenv-collect"""
    _start("collect")


def imagine() -> None:
    """worldenv-imagine"""
    _start("imagine")


def export() -> None:
    """worldenv-export"""
    _start("export")


def play() -> None:
    """worldenv-play"""
    _start("play")


def doctor() -> None:
    """worldenv-doctor"""
    _start("doctor")


def push() -> None:
    """worldenv-push"""
    _start("push")


def _start(script: str) -> None:
    signals.end_at_once()
    from worldenv import cli  # torch and all the rest

    getattr(cli, script)()
