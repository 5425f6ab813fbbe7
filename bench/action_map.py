"""Does the action map make the world truer? One and eight chunks ahead, with and without it.

    python -m bench.action_map RUN... [--steps 400] [--arms none map] [--seconds-of-what]

For each run folder the first round's simulator is trained anew by its own stage on the run's
episodes, once as configured and once with `simulator.action_map`: the same seed, weights, batches
and noise. Then real actions are replayed from the first frames of episodes that it was not trained
on (the held-out ones of the first round, and all of the second), and from two places in mid-episode,
and compared with what was real. Differences are paired by place and resampled by episode. Nothing
is written into the run folders; trained simulators are kept in --work and not trained twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldenv.config import Config, fingerprint, load
from worldenv.data.episodes import read_episodes
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.models.simulator import Simulator
from worldenv.runtime.seeds import derive
from worldenv.stages import simulator as stage
from worldenv.stages import store
from worldenv.stages.collect import load_round
from worldenv.stages.run import Run, read_record, write_record

ROOT = Path(__file__).parents[1]
ARMS = {
    "none": {},
    "map": {"action_map": True},
    "map and rays": {"action_map": True, "ray_maps": True},
}
AHEAD = (1, 8)  # chunks
MIDDLE = (4, 8)  # frames from where mid-episode replays begin
MOVED = 0.15 * 127.5  # grey levels, as the simulator's loss has it


def trained(run: Path, arm: str, steps: int, work: Path) -> tuple[Config, Simulator, dict]:
    """The first round's simulator of a run, trained as it was there but for the arm and steps."""
    config = load(run / "config.json")
    part = replace(config.simulator, steps=steps, **ARMS[arm])
    folder = work / f"{run.name}-{arm.replace(' ', '-')}-{steps}"
    config = replace(config, run_dir=folder, simulator=part, threads=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((run / "data").resolve())
    here = Run(config)
    try:
        mark, path = fingerprint(config.seed, part), folder / "stages" / "simulator-0.json"
        record = read_record(path)
        if record is None or record.get("mark") != mark:
            record = {"mark": mark, **stage.run(here, mark, 0)}
            write_record(path, record)
    finally:
        here.close()
    model = store.load("simulator", folder / "checkpoints" / "simulator-0.safetensors")
    return config, model, {k: v for k, v in record.items() if k != "mark"}


def unseen(run: Path, config: Config) -> list[FrameSequence]:
    """Sequences from the first step of episodes that the first round's simulator is not trained on,
    long enough to look the farthest ahead."""
    reading = Run(replace(config, run_dir=run), writes=False)
    _, _, episodes = load_round(reading, 0)
    reading.close()
    episodes = [*episodes, *read_episodes(run / "data" / "explore-1", config.env.image_size)]
    sequences = from_first_step(chunk_sequences(episodes, config.env.chunk))
    return [s for s in sequences if len(s) > max(AHEAD)]


@torch.no_grad()
def imagined(
    simulator: Simulator, real: Sequence[FrameSequence], begin: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Replays from frame `begin`, which the simulator sees with the one before, as it does where
    post-training begins in mid-episode: images `[N, F, ...]` and proprio, F = 1 + the farthest."""
    everyone, count = np.ones(len(real), bool), max(AHEAD)
    first = max(begin - 1, 0)
    image = torch.stack([s.images[first : begin + 1] for s in real])
    proprio = torch.stack([s.proprio[first : begin + 1] for s in real])
    led = torch.stack([s.actions[first:begin] for s in real])
    led = torch.cat([torch.zeros_like(real[0].actions[:1]).expand(len(real), 1, -1, -1), led], 1)
    state = simulator.start(len(real))
    seeds = torch.tensor([derive(seed, begin, i) for i in range(len(real))])
    simulator.prefill(state, everyone, image, proprio, led, seeds)
    images, poses = [image[:, -1]], [proprio[:, -1]]
    for t in range(begin, begin + count):
        action = torch.stack([s.actions[t] for s in real])
        for kept, new in zip(
            (images, poses), simulator.step(state, action, steps, everyone), strict=True
        ):
            kept.append(new)
    return torch.stack(images, 1), torch.stack(poses, 1)


def errors(
    simulator: Simulator, real: list[FrameSequence], steps: int, seed: int
) -> Iterator[dict]:
    """One row for each replay: where it began, its episode, and its errors at each distance."""
    for begin in (0, *MIDDLE):
        held = [s for s in real if len(s) > begin + max(AHEAD)]
        images, poses = imagined(simulator, held, begin, steps, seed)
        for i, s in enumerate(held):
            for h in AHEAD:
                true, before = s.images[begin + h].float(), s.images[begin + h - 1].float()
                wrong = ((images[i, h].float() - true) / 255).square()
                moved = ((true - before).abs() > MOVED).any(-1)
                off = 1000 * (poses[i, h, :3] - s.proprio[begin + h, :3]).norm()
                yield {
                    "from": "first frame" if begin == 0 else "mid-episode",
                    "ahead": h,
                    "episode": i if begin == 0 else s.episode,
                    "effector_mm": float(off),
                    "mse": float(wrong.mean()),
                    **{f"mse_view_{v}": float(w.mean()) for v, w in enumerate(wrong)},
                    "mse_moving": float(wrong[moved].mean()) if moved.any() else None,
                }
