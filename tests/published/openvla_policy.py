"""Policies of tiny folders, in float32, and what they see."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from published import openvla as published

from worldenv.config import PolicyConfig
from worldenv.data.embodiment import Embodiment, Entry
from worldenv.models.openvla import OpenVLA
from worldenv.models.openvla_folder import load

ROBOT = Embodiment(
    name="robot",
    views=("front", "wrist"),
    proprio=tuple(Entry(f"q{i}", "joint") for i in range(8)),
    action=("translate",) * 3 + ("turn",) * 3 + ("grip",),
    image_size=28,
    render_size=28,
    rotation=0,
    chunk=2,
    control_hz=20.0,
    gripper_closes=1,
    gripper_open=0.06,
    normalisation="q99",
)
SHALLOW = replace(published.TINY, depths=(3, 4))
PROMPTS = ("pick up the black bowl", "Open the drawer", "go")


def policy(
    folder: Path,
    kind: str = "openvla-oft",
    *,
    robot: Embodiment = ROBOT,
    train: bool = True,
    **fields,
) -> OpenVLA:
    """The folder's policy; without adapters, unless asked for."""
    usual = {"lora_rank": 0, "precision": "float32"}
    return load(PolicyConfig(kind=kind, folder=folder, **{**usual, **fields}), robot, train)


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
