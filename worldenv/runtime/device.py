"""Which device a run uses, what the machine is, and how much memory a run took at its peak."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

from worldenv.runtime.errors import UserError

GIB = 1 << 30
BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."


def pick(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto" is a GPU if there is one, else the CPU. Without an
    index, the GPU is the first, or that of this rank's number on its node.

    Raises UserError for a name torch does not know and for a GPU that is not there.
    """
    local = int(os.environ.get("LOCAL_RANK") or 0)
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"Unknown device {name!r}. Expected auto, cpu, cuda or cuda:<index>."
        ) from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(
            f"Device {name!r} is not supported. Expected auto, cpu, cuda or cuda:<index>."
        )
    count, index = torch.cuda.device_count(), local if device.index is None else device.index
    if 0 < count <= index == local:
        raise UserError(
            f"This node's rank {local} needs a GPU of its own, but torch sees {count}. Start "
            f"{count} processes on it (torchrun --nproc-per-node {count}), or ask for --device cpu."
        )
    if index >= count:
        build = "" if torch.version.cuda else " This torch is a CPU build: install a CUDA build."
        raise UserError(
            f"Device {name!r} was asked for, but torch sees {count} GPUs.{build} "
            "Ask for auto: worldenv-train --device auto, or `device` in a run folder's config.json."
        )
    return torch.device("cuda", index)


def cpu_features() -> dict[str, bool]:
    """Instruction sets this CPU and its operating system support, by name; {} off x86-64.

    Raises UserError if the extension is not built.
    """
    try:
        from worldenv import _C
    except ImportError as error:
        raise UserError(
            f"worldenv._C cannot be imported ({error}). Build it: {BUILD_COMMAND}"
        ) from error
    return _C.cpu_features()


def autocast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32, which is then faster."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        features = cpu_features()
        native = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    return torch.bfloat16 if native else torch.float32


def describe() -> dict[str, Any]:
    """The machine, as results.json records it; sizes in bytes."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_limit(),
        "gpu": gpus[0] if gpus else None,
        "gpus": len(gpus),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or its container's if less."""
    total = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(limit)
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


class PeakMemory:
    """Watches the memory of this process and its children while the `with` block runs.

    `bytes` is the highest sum of resident sizes seen, sampled every `interval` seconds from a
    thread. Pages that processes share are counted in each, so it errs upward. `gpu_bytes` is what
    torch's tensors took of a GPU at most.
    """

    def __init__(self, device: torch.device | None = None, interval: float = 0.5) -> None:
        self.bytes = self.gpu_bytes = 0
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def peaks(self) -> dict[str, int]:
        """Both, as a record keeps them."""
        found = {"peak_memory_bytes": self.bytes}
        return found if self._gpu is None else {**found, "peak_gpu_bytes": self.gpu_bytes}

    def __enter__(self) -> PeakMemory:
        self._sample()
        if self._gpu is not None:
            torch.cuda.reset_peak_memory_stats(self._gpu)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        if self._gpu is not None:
            self.gpu_bytes = torch.cuda.max_memory_allocated(self._gpu)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, resident_bytes())


def give_back() -> None:
    """Return to the system what has been freed: glibc keeps it, and what a stage needed at its peak
    would be held through all that follow. Elsewhere allocators do it themselves."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """Resident memory of this process and all its children now."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:  # it ended since it was listed
            continue
    return total


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
