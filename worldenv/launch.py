"""The ranks of a run, from torchrun's environment: they meet, agree on what to do, and part.

    torchrun --nproc-per-node 2 -m worldenv --preset smoke

Rank 0 talks; what the others say is in `<run folder>/ranks/rank-<n>.log`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import worldenv
from worldenv.config import Config
from worldenv.fields import to_dict
from worldenv.models.folder import digest
from worldenv.runtime import device as devices
from worldenv.runtime import parallel, ranks, signals
from worldenv.runtime.errors import UserError
from worldenv.runtime.revision import commit
from worldenv.runtime.watch import Watch


@contextmanager
def together(config: Config, files: Mapping[str, Path] | None = None) -> Iterator[None]:
    """Within, this process is a rank among those that torchrun started, if it did.

    files: checkpoints that were named, by their flag. UserError, on all of them, where ranks are of
    different configurations, versions, GPUs or artifacts, have no run folder in common, or are more
    than a batch has shards or an iteration groups.
    """
    device = devices.pick(config.device)
    ranks.join(device)
    if ranks.count() == 1:
        check_alone(config)
        yield
        return
    watch = Watch(config.run_dir / "ranks")
    try:
        _agree(config, device, files or {})
        _check_folder(config)
        _check_count(config, device)
        if not ranks.lead():
            watch.voice = _talk_into(config)
        yield
        ranks.leave()  # after an error the process ends as it is: to part may wait for the others
    except (Exception, KeyboardInterrupt) as error:
        with signals.ignored():  # torchrun stops all ranks when one ends, and asks no second time
            blamed = watch.explain() if _broken(error) else None
        if blamed is not None:
            raise blamed from error
        watch.say(error)
        raise
    finally:
        watch.close()


def _broken(error: BaseException) -> bool:
    """Whether it may be another rank's fault: a connection that broke, or torchrun's word to stop,
    which it gives to all when one ends."""
    return isinstance(error, KeyboardInterrupt | dist.DistError) or "gloo" in str(error)


def _agree(config: Config, device: torch.device, files: Mapping[str, Path]) -> None:
    """UserError naming what differs between ranks."""
    own = {
        **dict(_flat(to_dict(config))),
        **_artifacts(config, files),
        "device": _kind(device),
        "worldenv": worldenv.__version__,
        "worldenv's commit": commit(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    every = ranks.gather(own)
    for name in own:
        values = [facts.get(name) for facts in every]
        for number, value in enumerate(values):
            if value != values[0]:
                raise UserError(
                    f"{name}: expected the same on every rank, got {values[0]!r} on rank 0 and "
                    f"{value!r} on rank {number}. Give every node the same command, version, "
                    "artifacts and kind of device."
                )


def _artifacts(config: Config, files: Mapping[str, Path]) -> dict[str, str]:
    """Digests, of size and samples, of what each node reads by a path of its own."""
    parts = (config.policy, config.simulator, config.reflector)
    named = {f"--{kind} {path}": path for kind, path in files.items()}
    named |= {str(folder): folder for part in parts for folder in part.reads}
    return {n: digest(p)[:12] if p.exists() else "not there" for n, p in named.items()}


def _kind(device: torch.device) -> str:
    """What a rank computes on: a GPU by name and memory, in GiB."""
    if device.type != "cuda":
        return device.type
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / devices.GIB:.0f} GiB"


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _check_folder(config: Config) -> None:
    """UserError unless all ranks see one run folder: rank 0 writes it, the others read."""
    token = config.run_dir / f".ranks-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}"

    def leave_token() -> None:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()

    ranks.together(leave_token)
    seen = ranks.gather(token.exists())
    ranks.together(lambda: token.unlink())
    if not all(seen):
        blind = [str(number) for number, sees in enumerate(seen) if not sees]
        raise UserError(
            f"run_dir {config.run_dir}: expected a folder that all ranks see, got one that rank "
            f"{', '.join(blind)} does not. Name a folder on a file system that the nodes share."
        )


def _check_count(config: Config, device: torch.device) -> None:
    parallel.use_threads(config.threads, config.shards)
    most = parallel.shards(device)
    if ranks.count() > most:
        raise UserError(
            f"ranks: expected at most {most}, one for each shard of a batch, got {ranks.count()}. "
            f"Start {most} (torchrun --nproc-per-node), or cut batches into more (--shards "
            f"{ranks.count()}), which changes results as another seed does."
        )
    groups = config.posttrain.contexts
    if ranks.count() > groups:
        raise UserError(
            f"ranks: expected at most {groups}, one for each group of imagined episodes, got "
            f"{ranks.count()}. Start {groups} (torchrun --nproc-per-node), or have more groups "
            f"(--posttrain.contexts {ranks.count()})."
        )


def check_alone(config: Config) -> None:
    """UserError where one process is asked to share a model among ranks."""
    if config.fsdp:
        raise UserError(
            f"fsdp: expected several ranks to share the {' and the '.join(config.fsdp)}, got one "
            "process. Start with torchrun --nproc-per-node N -m worldenv, or leave out --fsdp: "
            "what a sharded run left can be gone on from without."
        )


def _talk_into(config: Config) -> int:
    """Have all that this rank prints in a file of its own; where it went before."""
    folder = config.run_dir / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(
        folder / f"rank-{ranks.number()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    sys.stdout.flush(), sys.stderr.flush()
    voice = os.dup(2)
    os.dup2(log, 1), os.dup2(log, 2)
    return voice
