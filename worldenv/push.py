"""`worldenv-push`: what a run has learned or recorded, on the hub, with a card of its figures.

It stands beside cli.py, which starts it.
"""

import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from worldenv.runtime import hub
from worldenv.runtime.errors import UserError
from worldenv.stages import publish
from worldenv.stages.run import open_run
from worldenv.words import parse


@dataclass(frozen=True)
class PushArguments:
    """Put a policy, a world, a judge or episodes of a run on the hub, with a card of their figures.

    What is sent is a folder: weights as safetensors (episodes as HDF5), config.json, results.json
    and a README.md whose figures come from the run's results. A repository that is not there is
    made. Others then use it by its name: worldenv-train --policy user/name. A token is needed:
    run `hf auth login` once, or set HF_TOKEN.
    """

    what: tyro.conf.Positional[Literal["policy", "simulator", "reflector", "data"]] = "policy"
    """What of the run to send."""
    repository: tyro.conf.Positional[str | None] = None
    """Where to: user/name. Not needed with --dry-run."""
    run_dir: Path = Path("runs/default")
    """Run folder to send from."""
    name: str | None = None
    """Which one, as its file or folder is called: policy-sft, simulator-0, explore-1. Default: the
    last round's; of data the demonstrations."""
    private: bool = False
    """Make a repository that only its owner sees. One that is there stays as it is."""
    license: str | None = None
    """License to say in the card, by the hub's short name, such as apache-2.0."""
    dry_run: bool = False
    """Write the folder and send nothing."""
    out: Path = Path("hub")
    """With --dry-run: folder in which the folder is written."""


def main() -> None:
    """worldenv-push"""
    arguments = parse(PushArguments)
    named = hub.parse(arguments.repository or "")
    if not arguments.dry_run and (named is None or named[1] is not None):
        raise UserError(
            f"repository: expected user/name, got {arguments.repository or 'none'}. Name one, or "
            "write the folder only (--dry-run)."
        )
    with closing(open_run(arguments.run_dir)) as run:
        chosen = publish.find(run, arguments.what, arguments.name)
        with tempfile.TemporaryDirectory(prefix="worldenv-push-") as scratch:
            folder = (arguments.out if arguments.dry_run else Path(scratch)) / chosen.name
            publish.write(
                run, chosen, folder, arguments.repository or "user/name", arguments.license
            )
            _list(folder)
            if arguments.dry_run:
                return
            kind: hub.Kind = "dataset" if arguments.what == "data" else "model"
            message = f"{chosen.name} of a worldenv run"
            print(hub.push(folder, arguments.repository, kind, arguments.private, message))


def _list(folder: Path) -> None:
    print(folder)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>12,}  {file.relative_to(folder)}")
