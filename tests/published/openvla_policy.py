"""Policies of tiny folders, in float32, and what they see."""

import os
import shutil
from pathlib import Path

import torch

from worldenv.config import PolicyConfig
from worldenv.models.openvla import OpenVLA
from worldenv.models.openvla_folder import load
from worldenv.models.openvla_inputs import Gripper

GRIPPER = Gripper((6,), opened=-1.0, closed=1.0)
PROMPTS = ("pick up the black bowl", "Open the drawer", "go")


def policy(
    folder: Path,
    kind: str = "openvla-oft",
    *,
    chunk: int = 2,
    actions: int = 7,
    train: bool = True,
    **fields,
) -> OpenVLA:
    """The folder's policy of two views; without adapters, unless asked for."""
    config = PolicyConfig(
        kind=kind, folder=folder, **{"lora_rank": 0, "precision": "float32", **fields}
    )
    sizes = {"views": 2, "proprio": 8, "chunk": chunk, "actions": actions}
    return load(config, **sizes, gripper=GRIPPER, train=train)


def look(rows: int = 3, size: int = 28, seed: int = 0) -> dict:
    """What a policy sees."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (rows, 2, size, size, 3), dtype=torch.uint8, generator=g)
    proprio = 0.5 * torch.randn(rows, 8, generator=g)
    return {"image": image, "proprio": proprio, "instruction": list(PROMPTS[:rows])}


def row(observation: dict, i: int) -> dict:
    """One row of it."""
    return {name: value[i : i + 1] for name, value in observation.items()}


def copied(folder: Path, to: Path) -> Path:
    """A copy to damage: files are links, so replace them and write into none."""
    shutil.copytree(folder, to, copy_function=os.link)
    return to
