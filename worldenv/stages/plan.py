"""What a configuration needs, before anything is built: bytes of each stage, time per iteration.

A stage holds different things at different moments (`stages.plan_moments`); shown is its highest.
Where that is more than the machine has, changes are looked for that make it fit.
"""

import time
from dataclasses import dataclass, replace

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from worldenv import launch
from worldenv.config import Config
from worldenv.runtime import device as devices
from worldenv.runtime import parallel
from worldenv.runtime.device import GIB
from worldenv.stages.plan_advice import Change, advise
from worldenv.stages.plan_costs import Costs
from worldenv.stages.plan_data import Data, disk, recorded
from worldenv.stages.plan_moments import Machine, Moment, highest, iteration_flops, moments
from worldenv.stages.plan_ranks import Choice, choices, spread

CONTEXT = 600 << 20  # bytes that CUDA takes for itself, about


@dataclass(frozen=True)
class Plan:
    """Moments by stage, each its highest, and what follows from them."""

    machine: Machine
    costs: Costs
    stages: dict[str, Moment]
    changes: list[Change]  # that make it fit, where it does not; empty if nothing does
    seconds: dict[str, float]  # per iteration, an estimate
    data: Data
    disk: tuple[int, int]  # bytes that episodes take at most at once, and those that are free
    choices: list[Choice]  # of every trained model, on several ranks

    @property
    def fits(self) -> bool:
        """Whether every stage does, and the episodes."""
        needed, free = self.disk
        return needed <= free and all(m.bytes <= self.machine.memory for m in self.stages.values())


def plan(config: Config, memory: float | None = None, ranks: int = 1) -> Plan:
    """Of a configuration on the device it names, of which each rank has one; memory: GiB to plan
    for, in place of its own. UserError where one rank is to share a model with itself."""
    here = replace(machine(config, memory), ranks=ranks)
    if ranks == 1:
        launch.check_alone(config)
    costs = Costs(config, here.widened)
    if here.cpu:
        here = replace(here, own=own_bytes())  # only now: with the libraries of its models
    found = spread(moments(config, costs, here), config, costs, here)
    stages = {name: highest(of) for name, of in found.items()}
    chosen = [*choices(config, costs, here)] if ranks > 1 else []
    fits = all(m.bytes <= here.memory for m in stages.values())
    changes = [] if fits else advise(config, costs, here)
    rates: dict[str, float] = {}
    seconds = {}
    work = {} if here.absent else iteration_flops(config, costs)
    for name, parts in work.items():
        for kind in parts.keys() - rates.keys():
            rates[kind] = rate(here.device, getattr(torch, kind))
        seconds[name] = sum(flops / rates[kind] for kind, flops in parts.items())
    room = disk(config)
    return Plan(here, costs, stages, changes, seconds, recorded(config), room, chosen)


def machine(config: Config, memory: float | None) -> Machine:
    """The machine that is planned for. A GPU that is not here can be, if its memory is said."""
    absent = config.device.startswith("cuda") and not torch.cuda.is_available()
    if absent and memory is not None:
        device = torch.device(config.device)
    else:
        device = devices.pick(config.device)
    if memory is not None:
        size = int(memory * GIB)
    elif device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        size = devices.memory_limit()
    threads = config.threads or parallel.threads()
    narrow = device.type == "cpu" and devices.autocast_dtype("cpu") is torch.float32
    return Machine(device, size, CONTEXT, threads, narrow, absent)


def own_bytes() -> int:
    """Resident bytes of this process after training steps on the CPU, in a run's threads: the
    libraries that these load, and what they take to begin with, are most of what a small run
    holds."""

    def step() -> None:
        see, attend = nn.Conv2d(8, 8, 3), nn.TransformerEncoderLayer(256, 4, batch_first=True)
        (see(torch.ones(4, 8, 64, 64)).sum() + attend(torch.ones(2, 64, 256)).sum()).backward()
        torch.optim.AdamW(see.parameters()).step()

    parallel.run([step] * parallel.SHARDS)
    devices.give_back()
    return psutil.Process().memory_info().rss


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s at which the device multiplies matrices, on all threads that a run would use. Takes
    a second at most."""
    side = 8192 if device.type == "cuda" else 1024
    if device.type == "cpu" and dtype is torch.bfloat16:
        dtype = devices.autocast_dtype("cpu")  # what `models.widened` multiplies in
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.3:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    if device.type == "cuda":
        return 2 * side**3 / best
    busy = min(parallel.threads(), parallel.SHARDS)
    return 2 * side**3 / best * busy / torch.get_num_threads()


# ---------------------------------------------------------------- as people read it


def main(config: Config, memory: float | None = None, ranks: int = 1) -> int:
    """Print the plan; the exit code says whether it fits."""
    found = plan(config, memory, ranks)
    console = Console(width=max(Console().width, 100))
    console.print(_models(found))
    console.print(_memory(found))
    for line in _says(found):
        console.print(line, highlight=False)
    return 0 if found.fits else 1


def _models(found: Plan) -> Table:
    table = Table("", "parameters", "trained", "frozen", "sizes from", title="models")
    costs = found.costs
    for name in ("policy", "simulator", "reflector"):
        model = getattr(costs, name)
        numbers = (_count(model.parameters), _count(model.trained), _size(model.frozen_bytes))
        table.add_row(name, *numbers, model.source)
    return table


def _memory(found: Plan) -> Table:
    """One column a stage, at its highest moment."""
    title = f"memory on {_device(found.machine)}"
    table = Table("", title=title)
    for name, moment in found.stages.items():
        table.add_column(f"{name}\n{moment.what}", justify="right")
    kinds = dict.fromkeys(kind for m in found.stages.values() for kind in m.parts)
    for kind in kinds:
        values = [m.parts.get(kind, 0) for m in found.stages.values()]
        if any(values):
            table.add_row(kind, *(_size(v) if v else "" for v in values))
    table.add_section()
    table.add_row("in all", *(_size(m.bytes) for m in found.stages.values()))
    if found.seconds:
        every = (found.seconds.get(name) for name in found.stages)
        table.add_row("time per iteration", *("" if s is None else _time(s) for s in every))
    return table


def _says(found: Plan) -> list[str]:
    here, said = found.machine, []
    if here.absent:
        said.append("No times: the GPU that is planned for is not here.")
    else:
        where = "this machine's CPU" if here.cpu else str(here.device)
        said.append(
            f"Times are estimates: FLOPs over the rate at which {where} multiplies matrices; small "
            "models reach a fraction of it. Imagined episodes are taken to run their full length."
        )
    said += _disk(found)
    if found.choices:
        said.append(f"On each of {here.ranks} ranks (estimates, not measured on several GPUs):")
    for choice in found.choices:
        said.append(f"    {choice.model}: {choice.why.format(*map(_size, choice.sizes))}")
    worst = max(found.stages, key=lambda name: found.stages[name].bytes)
    most = found.stages[worst].bytes
    if most <= here.memory:
        fits = "It fits" if found.fits else "It fits in memory, not on the disk"
        said.append(f"{fits}: {_size(most)} of {_size(here.memory)} ({worst}).")
        return said
    said.append(f"It does not fit: {worst} needs {_size(most)}, there is {_size(here.memory)}.")
    if found.changes:
        said.append("With these it does:")
        said += [f"    {change.flag} {change.said}".rstrip() for change in found.changes]
    else:
        said.append(
            "No smaller batch makes it fit: choose smaller models, name a finished checkpoint "
            "(--simulator FILE), or a machine with more memory."
        )
    return said


def _disk(found: Plan) -> list[str]:
    """Where episodes lie, and whether there is room."""
    needed, free = found.disk
    shown, *rest = found.data.folders
    lie = ""
    if found.data.on_disk:
        names = ("demonstrations", *(f"explore-{n}" for n in range(len(rest))))
        there = [name for name, f in zip(names, found.data.folders, strict=True) if f.on_disk]
        lie = f"; read from there as they are drawn (--data.memory): {', '.join(there)}"
    count = f"{shown.episodes} demonstrations of {shown.frames} frames"
    if rest:
        count += f", {sum(f.episodes for f in rest)} explored episodes"
    said = [f"Disk: {_size(needed)} at most for {count}, {_size(free)} free{lie}."]
    if needed > free:
        said.append(
            "They have no room: choose a run_dir on a larger disk, fewer (--data.episodes) or "
            "smaller pictures (--env.image-size)."
        )
    return said


def _device(here: Machine) -> str:
    kind = "GPU" if here.device.type == "cuda" else "CPU"
    return f"a {kind} with {_size(here.memory)}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1024:.1f} KiB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.2g} s"
