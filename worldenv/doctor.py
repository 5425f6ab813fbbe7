"""`worldenv-doctor`: what this machine has of what worldenv needs, and how to get what it lacks.

It stands at the top, beside cli.py, because it looks at every floor (the environments' assets
too) and runtime/ may import none of them. Anything that could crash or wait for an answer, such as
a GL driver or LIBERO's first import, is tried in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from worldenv import __version__
from worldenv.data.libero_hdf5 import LIBERO
from worldenv.envs.benchmark import begun, find, registered
from worldenv.envs.libero import assets, official_assets
from worldenv.runtime import device, graphics
from worldenv.runtime.errors import UserError
from worldenv.sources import EnvConfig

State = Literal["ok", "note", "missing"]
GIB = 1 << 30
NEEDED_DISK = 2 * GIB  # a default run's episodes, checkpoints and videos, with room to spare
NEEDED_MEMORY = 8 * GIB

_LIBERO_VERSIONS = {  # distribution: lowest version, first version too new
    "mujoco": ("3.3", "3.9"),
    "robosuite": ("1.4.0", "1.4.1"),
    "bddl": ("1.0.1", "1.0.2"),
    "hf-libero": ("0.1.4", "0.1.5"),
}
_IMPORT_TIMEOUT = 180  # seconds
_IMPORT_LIBERO = """
import tempfile
from pathlib import Path
from worldenv.envs.libero.assets import configure_libero
configure_libero(Path(tempfile.gettempdir()))
import libero.libero.benchmark
import libero.libero.envs
"""


@dataclass(frozen=True)
class Finding:
    """One row: what was looked for, what was found, and how to mend it.

    state: "ok"; "note", something optional is absent or short; "missing", worldenv needs it.
    """

    name: str
    state: State
    found: str
    mend: str = ""


def examine(folder: Path) -> list[Finding]:
    """Every row of the table; `folder` is where runs would be written."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_torch,
        check_device,
        check_extension,
        check_cpu,
        check_triton,
        check_graphics,
        check_libero,
        check_assets,
        *listed(),
        check_optional,
        lambda: check_disk(folder),
        check_memory,
    ]
    return [check() for check in checks]


def listed() -> list[Callable[[], Finding]]:
    """A check for each benchmark beside LIBERO, which `check_libero` looks at."""
    return [partial(check_benchmark, name) for name in registered() if name != LIBERO]


def check_python() -> Finding:
    """Python 3.11 or 3.12."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    mend = "" if good else "make clean && make PYTHON=python3.12"
    return Finding("Python", _state(good), platform.python_version(), mend)


def check_torch() -> Finding:
    """torch in the supported range."""
    version = Version(torch.__version__)
    good = Version("2.11") <= Version(version.base_version) < Version("2.14")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    mend = "" if good else 'pip install "torch>=2.11,<2.14", then ' + device.BUILD_COMMAND
    return Finding("torch", _state(good), f"{version}, {build}", mend)


def check_device() -> Finding:
    """The device a run would pick; a GPU that torch cannot use is worth a note."""
    chosen = device.pick()
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        name = torch.cuda.get_device_name(chosen)
        return Finding("device", "ok", f"{name}, {_size(free)} of {_size(total)} free")
    if shutil.which("nvidia-smi"):
        mend = 'make clean && make TORCH="torch>=2.11,<2.14" (a CUDA build matching the driver)'
        return Finding("device", "note", "CPU, though nvidia-smi is there", mend)
    machine = device.describe()
    return Finding("device", "ok", f"CPU: {machine['cpu']}, {machine['cores']} cores")


def check_extension() -> Finding:
    """worldenv._C, and whether it holds CUDA kernels where torch could use them."""
    try:
        from worldenv import _C
    except ImportError as error:
        return Finding("extension", "missing", f"worldenv._C: {error}", device.BUILD_COMMAND)
    build = _C.build_info()
    kind = "C++ and CUDA" if build["cuda"] else "C++"
    found = f"{kind}, {build['compiler']}, {build['architecture']}"
    if torch.cuda.is_available() and not build["cuda"]:
        mend = f"install nvcc (CUDA {torch.version.cuda}), then {device.BUILD_COMMAND}"
        return Finding("extension", "note", f"{found}; no CUDA kernels", mend)
    return Finding("extension", "ok", found)


def check_cpu() -> Finding:
    """Instruction sets the CPU kernels choose from."""
    try:
        features = device.cpu_features()
    except UserError as error:
        return Finding("CPU features", "missing", str(error), device.BUILD_COMMAND)
    found = " ".join(name for name, there in features.items() if there) or "portable path only"
    kind = "native" if device.autocast_dtype("cpu") is torch.bfloat16 else "emulated, so unused"
    return Finding("CPU features", "ok", f"{found}; bfloat16 {kind}")


def check_triton() -> Finding:
    """Triton: needed on a GPU; on a CPU only its interpreter runs, in tests."""
    version = _version("triton")
    if version is None:
        state: State = "missing" if torch.cuda.is_available() else "note"
        return Finding("Triton", state, "not installed", 'pip install "triton>=3.6,<3.9"')
    found = str(version)
    if version < Version("3.7") and (numpy := _version("numpy")) and numpy >= Version("2.4"):
        found += f"; its interpreter fails with numpy {numpy}"
        return Finding("Triton", "note", found, 'pip install "numpy<2.4" (tests only)')
    use = "compiles for this GPU" if torch.cuda.is_available() else "interpreter only, no GPU"
    return Finding("Triton", "ok", f"{found}, {use}")


def check_graphics() -> Finding:
    """A GL library that MuJoCo renders with, found by rendering."""
    if _version("mujoco") is None:
        return Finding("GL backend", "missing", "not tried: no mujoco", _libero_mend())
    try:
        return Finding("GL backend", "ok", f"{graphics.choose()} renders")
    except UserError as error:
        return Finding("GL backend", "missing", str(error), graphics.INSTALL_COMMAND)


def check_libero() -> Finding:
    """The benchmark's packages at the versions that work together, and that LIBERO imports."""
    found, wrong = [], []
    for name, (low, high) in _LIBERO_VERSIONS.items():
        version = _version(name)
        found.append(f"{name} {version or 'missing'}")
        if version is None or not Version(low) <= version < Version(high):
            wrong.append(name)
    text = ", ".join(found)
    if wrong:
        return Finding("LIBERO", "missing", text, _libero_mend())
    try:
        result = subprocess.run(
            [sys.executable, "-c", _IMPORT_LIBERO],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_IMPORT_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"no end after {_IMPORT_TIMEOUT} s"
        return Finding("LIBERO", "missing", f"{text}; import: {reason}", _libero_mend())
    if result.returncode == 0:
        return Finding("LIBERO", "ok", text)
    reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding("LIBERO", "missing", f"{text}; import fails: {reason}", _libero_mend())


def check_assets() -> Finding:
    """Which asset files each suite would load."""
    named = os.environ.get(assets.ASSETS_VARIABLE)
    variable = f"export {assets.ASSETS_VARIABLE}=<LIBERO's assets folder>"
    pack = f"the primitive pack serves {', '.join(assets.PRIMITIVE_SUITES)}"
    if not named or named == assets.OFFICIAL:
        fetched = official_assets.at_hand()
        mend = f"{official_assets.COMMAND} (or {variable})"
        if fetched is None and named:
            return Finding("assets", "missing", f"{named}, which have not been fetched", mend)
        if fetched is None:
            found = f"none: {pack}; other suites need LIBERO's files"
            return Finding("assets", "note", found, mend)
        pack = "" if named else f"; {pack} unless asked for them (--env.assets official)"
        return Finding("assets", "ok", f"{fetched}{pack}")
    path, good = Path(named).expanduser(), []
    for suite in assets.SUITES:
        try:
            assets.check_assets(path, suite, f"${assets.ASSETS_VARIABLE}")
        except UserError as error:
            problem = str(error)
        else:
            good.append(suite)
    if good:
        return Finding("assets", "ok", f"{path}: {', '.join(good)}")
    return Finding("assets", "missing", problem, f"{variable}, or unset it for the primitive pack")


def check_benchmark(name: str) -> Finding:
    """Whether a benchmark can be found and has what it needs."""
    try:
        found = find(name)
        found.check(begun(EnvConfig(), name))
    except UserError as error:
        return Finding(name, "note", str(error), "mend what it says, or leave the benchmark out")
    return Finding(name, "ok", f"benchmark with suites {', '.join(found.suites)}")


def check_optional() -> Finding:
    """Packages that are used where present and never assumed."""
    names = ("transformers", "diffusers", "flash-attn", "xformers")
    present = [f"{name} {version}" for name in names if (version := _version(name))]
    absent = [name for name in names if _version(name) is None]
    wanted = [n for n in absent if torch.cuda.is_available() or n in ("transformers", "diffusers")]
    found = ", ".join(present) or "none"
    if wanted:
        mend = f"pip install {' '.join(wanted)}"
        return Finding("optional", "note", f"{found}; without {', '.join(wanted)}", mend)
    return Finding("optional", "ok", found)


def check_disk(folder: Path) -> Finding:
    """Room for a run where runs are written."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{_size(free)} free in {folder.resolve()}"
    if free >= NEEDED_DISK:
        return Finding("disk", "ok", found)
    mend = f"free {_size(NEEDED_DISK - free)}, or write runs elsewhere"
    return Finding("disk", "missing", f"{found}; a run wants {_size(NEEDED_DISK)}", mend)


def check_memory() -> Finding:
    """Memory for the default run."""
    limit, available = device.memory_limit(), psutil.virtual_memory().available
    found = f"{_size(min(limit, available))} of {_size(limit)} available"
    if min(limit, available) >= NEEDED_MEMORY:
        return Finding("memory", "ok", found)
    wanted = f"{found}; the default run wants up to {_size(NEEDED_MEMORY)}"
    return Finding("memory", "note", wanted, "close other programs, or use --preset smoke")


def render(findings: list[Finding], console: Console) -> None:
    """Print the table, then the mends on lines of their own, so that they can be copied."""
    style = {"ok": "green", "note": "yellow", "missing": "bold red"}
    table = Table(title=f"worldenv {__version__}", title_justify="left")
    for column in ("", "", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        mark = f"[{style[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, mark, escape(finding.found))
    console.print(table)
    for finding in findings:
        if finding.mend:
            color = style[finding.state]
            console.print(f"[{color}]{finding.name}[/]: {escape(finding.mend)}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Examine this machine and print a table. Returns 1 if something needed is missing, else 0."""
    parser = argparse.ArgumentParser(prog="worldenv-doctor", description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are written")
    parser.add_argument(
        "--fetch-assets",
        action="store_true",
        help="First fetch LIBERO's official asset files from the hub and verify them: what "
        "libero_object, libero_goal and libero_10 need. Files that are here are not fetched again.",
    )
    options = parser.parse_args(arguments)
    if options.fetch_assets:
        print(f"here and whole: {official_assets.fetch()}")
    findings = examine(options.folder)
    render(findings, Console())
    missing = [finding.name for finding in findings if finding.state == "missing"]
    print(f"Missing: {', '.join(missing)}." if missing else "Everything needed is here.")
    return 1 if missing else 0


def _state(good: bool) -> State:
    return "ok" if good else "missing"


def _version(distribution: str) -> Version | None:
    try:
        return Version(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def _libero_mend() -> str:
    return (
        "pip install --no-build-isolation -e '.[libero]' && "
        "pip install --no-deps hf-libero==0.1.4 (its dependencies would bring torchvision)"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
