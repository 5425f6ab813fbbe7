"""`python -m bench.real`: what real LIBERO costs one worker, in CPU time.

Milliseconds of CPU (all threads of the process) of a control step under smooth random actions, of a
look (two cameras), and of an episode's reset; libero_spatial's task 8 on the primitive pack. Writes
results/bench/real-<machine>.json. No gate: physics and rendering are MuJoCo's.
"""

from __future__ import annotations

import time

import numpy as np

from bench.__main__ import RESULTS, machine_file, origin
from worldenv.envs.libero.assets import resolve_assets
from worldenv.envs.libero.worker import LiberoSimulator
from worldenv.envs.start import Start
from worldenv.stages.run import write_json

SUITE, TASK = "libero_spatial", 8
EPISODES, CHUNKS, CHUNK = 6, 12, 8


def smooth_actions(steps: int, seed: int) -> np.ndarray:
    """[steps, 7] float64 in [-1, 1]: noise of eight steps' memory."""
    draw = np.random.default_rng(seed).normal(size=(steps + CHUNK, 7))
    kernel = np.full(CHUNK, CHUNK**-0.5)
    smooth = [np.convolve(column, kernel, mode="valid")[:steps] for column in draw.T]
    return np.clip(0.7 * np.stack(smooth, axis=1), -1.0, 1.0)


def measure() -> dict[str, float]:
    """CPU milliseconds: medians over chunks of a step, over looks and over resets."""
    assets = resolve_assets(None, SUITE).path
    simulator = LiberoSimulator(SUITE, TASK, assets=assets)
    simulator.reset(Start(TASK, 0, 0))  # compiles the scene and numba's functions
    simulator.step(np.zeros(7))
    simulator.observe()
    spent: dict[str, list[float]] = {"step": [], "look": [], "reset": []}

    def timed(what: str, began: float, count: int = 1) -> None:
        spent[what].append((time.process_time() - began) * 1e3 / count)

    for episode in range(EPISODES):
        start = Start(TASK, episode, episode)
        began = time.process_time()
        simulator.reset(start)
        timed("reset", began)
        for chunk in smooth_actions(CHUNKS * CHUNK, episode).reshape(CHUNKS, CHUNK, 7):
            began = time.process_time()
            for action in chunk:
                simulator.step(action)
            timed("step", began, CHUNK)
            began = time.process_time()
            simulator.observe()
            timed("look", began)
    simulator.close()
    return {f"{what}_cpu_ms": float(np.median(times)) for what, times in spent.items()}


def main() -> None:
    """Measures, prints the three figures and writes the file."""
    figures = measure()
    for name, value in figures.items():
        print(f"{name:14s} {value:8.2f}")
    file = RESULTS / f"real-{machine_file()}"
    write_json(file, {**origin("bench.real"), **figures})
    print(file)


if __name__ == "__main__":
    main()
