"""A small world that nobody trained, with made-up episodes to begin at."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from worldenv.config import ReflectorConfig, SimulatorConfig
from worldenv.data.episode import Episode
from worldenv.envs.libero.cameras import of_tasks
from worldenv.envs.libero.robot import embodiment
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.play.session import World
from worldenv.presets import preset

ROBOT = embodiment(16, cameras=of_tasks("libero_spatial", [8]))


def made_up(source: str = "policy", chunks: int = 5, seed: int = 3) -> Episode:
    """An episode seen before each chunk and after the last."""
    g = np.random.default_rng(seed)
    steps = 8 * chunks
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction="pick up the black bowl next to the plate and place it on the plate",
        start=None,
        seed=seed,
        source=source,
        actions=g.uniform(-1.05, 1.05, (steps, 7)).astype(np.float32),
        dones=np.zeros(steps, bool),
        frame_steps=np.arange(chunks + 1) * 8,
        images=g.integers(0, 256, (chunks + 1, 2, 16, 16, 3), np.uint8),
        proprio=g.normal(0, 0.1, (chunks + 1, 8)).astype(np.float32),
        success=False,
    )


def small_world(folder: Path, simulator: type[Simulator] = Simulator) -> World:
    """Of one attempt and one demonstration, with five places each."""
    torch.manual_seed(0)
    network = simulator(SimulatorConfig(width=48, layers=1, heads=2, window=2), ROBOT)
    with torch.no_grad():
        for weights in network.parameters():  # many begin at zero: then nothing would move
            weights += 0.1 * torch.randn_like(weights)
    reflector = Reflector(ReflectorConfig(width=16, encoder_channels=8, threshold=0.9), ROBOT)
    recorded = [("attempt 1", made_up()), ("demonstration 1", made_up("demonstration", seed=4))]
    config = replace(preset("smoke"), run_dir=folder / "run")
    return World(config, ROBOT, network.eval(), reflector.eval(), recorded, 0)


class Beside:
    """Stands in for the real benchmark: remembers what it is told, and succeeds on the third
    chunk."""

    def __init__(self, config: object) -> None:
        self.starts, self.chunks, self.closed = [], [], False

    def reset(self, *, options: dict) -> tuple[dict, dict]:
        self.starts += options["starts"]
        self.chunks = []
        return {"image": np.full((1, 2, 16, 16, 3), 7, np.uint8)}, {}

    def step(self, actions: np.ndarray) -> tuple:
        self.chunks.append(actions[0])
        seen = {"image": np.full((1, 2, 16, 16, 3), 7 + len(self.chunks), np.uint8)}
        return seen, None, None, None, {"success": np.array([len(self.chunks) >= 3])}

    def close(self) -> None:
        self.closed = True
