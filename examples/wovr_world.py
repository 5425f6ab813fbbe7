"""Drive one of WoVR's published simulators of LIBERO by hand, and ask its reward network.

    python examples/wovr_world.py models/RLinf-Wan-LIBERO-Spatial --out hand.mp4

Begins at a real first frame, moves the hand down and closes the gripper, and writes what the world
imagines as a video.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from worldenv.config import SimulatorConfig
from worldenv.envs.imagined import Context, ImaginedVectorEnv
from worldenv.envs.libero.env import LiberoVectorEnv
from worldenv.envs.start import Start
from worldenv.models.wovr import WoVR
from worldenv.models.wovr_reward import load_reward
from worldenv.report.video import write_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the published folder, as downloaded")
    parser.add_argument("--vae", type=Path, help="of the autoencoder; default: in the folder")
    parser.add_argument("--out", type=Path, default=Path("wovr.mp4"), help="the video")
    parser.add_argument("--chunks", type=int, default=4, help="of eight actions each")
    parser.add_argument("--size", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--patch", type=int, default=32, help="pixels per token (Wan 2.1: 16)")
    arguments = parser.parse_args()

    real = LiberoVectorEnv("libero_spatial", 1, image_size=arguments.size, views=1)
    observation, _ = real.reset(options={"starts": [Start(8, 0, 0)]})
    config = SimulatorConfig(
        kind="wovr",
        folder=arguments.folder,
        tokenizer="wan-vae",
        tokenizer_folder=arguments.vae or arguments.folder / "Wan2.2_VAE.pth",
        patch=arguments.patch,
        precision="bfloat16",
    )
    world = WoVR(config, real.embodiment)
    context = Context(
        image=torch.as_tensor(observation["image"]),
        proprio=torch.as_tensor(observation["proprio"]),
        action=torch.zeros(1, *world.chunk),
        task=8,
        instruction=observation["instruction"][0],
        elapsed=0,
        won=False,
    )
    env = ImaginedVectorEnv(
        world, load_reward(arguments.folder), [context], 1, max_chunks=99, sampling_steps=5
    )
    seen, _ = env.reset(seed=0)
    frames = [seen["image"][0]]
    chunk = torch.zeros(1, *world.chunk)
    chunk[..., 2], chunk[..., -1] = -0.5, 1.0  # down, and close
    for k in range(arguments.chunks):
        seen, reward, *_ = env.step(chunk)
        frames.append(seen["image"][0])
        print(f"chunk {k + 1}: the reward network says {float(reward[0]):.3f}")
    write_video(arguments.out, np.stack([frame[0].cpu().numpy() for frame in frames]))
    print(arguments.out)
    real.close()


if __name__ == "__main__":
    main()
