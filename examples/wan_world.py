"""A published Wan as a world simulator, before it has learned anything of the robot.

    python examples/wan_world.py models/Wan2.1-T2V-1.3B-Diffusers --out wan.mp4

Begins at a real first frame and imagines the next ones, each against the cache of those before. Our
conditioning by actions enters at zero: what moves is Wan's own idea. `worldenv-train --preset
openvla-oft-wan` is how it learns.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from worldenv.config import SimulatorConfig
from worldenv.envs.libero.env import LiberoVectorEnv
from worldenv.envs.start import Start
from worldenv.models.wan_world import WanSimulator
from worldenv.report.video import write_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the published pipeline's folder, as downloaded")
    parser.add_argument("--out", type=Path, default=Path("wan.mp4"), help="the video")
    parser.add_argument("--frames", type=int, default=4, help="to imagine, one for eight actions")
    parser.add_argument("--steps", type=int, default=4, help="passes of sampling for a frame")
    parser.add_argument("--size", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--patch", type=int, default=16, help="pixels per token (Wan 2.2: 32)")
    arguments = parser.parse_args()

    env = LiberoVectorEnv("libero_spatial", 1, image_size=arguments.size)
    observation, _ = env.reset(options={"starts": [Start(8, 0, 0)]})
    config = SimulatorConfig(
        kind="wan",
        folder=arguments.folder,
        tokenizer="wan-vae",
        tokenizer_folder=arguments.folder,
        patch=arguments.patch,
        window=4,
        precision="bfloat16",
    )
    world = WanSimulator(config, env.embodiment).eval()
    state, row = world.start(1), np.ones(1, bool)
    image, proprio = (torch.as_tensor(observation[k])[:, None] for k in ("image", "proprio"))
    action = torch.zeros(1, 1, *world.chunk)
    world.prefill(state, row, image, proprio, action, torch.zeros(1, dtype=torch.int64))
    frames = [image[0, 0]]
    for k in range(arguments.frames):
        imagined, _ = world.step(state, action[:, 0], arguments.steps, row)
        frames.append(imagined[0])
        print(f"frame {k + 1}: {tuple(imagined.shape)}")
    write_video(arguments.out, np.stack([frame[0].numpy() for frame in frames]))
    print(arguments.out)
    env.close()


if __name__ == "__main__":
    main()
