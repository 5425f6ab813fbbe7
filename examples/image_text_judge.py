"""Ask a published image-text model whether a task is done, before and after a demonstration of it.

    python examples/image_text_judge.py models/Qwen2.5-VL-3B-Instruct

The paper's arm without a reward head: the reward is how much likelier Yes is than No.
"""

import argparse
from pathlib import Path

import torch

from worldenv.config import ReflectorConfig
from worldenv.envs.libero.env import LiberoVectorEnv
from worldenv.envs.start import Start
from worldenv.models.vlm_reflector import ImageTextReflector

SUITE, TASK = "libero_spatial", 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the published folder, as downloaded")
    arguments = parser.parse_args()

    env = LiberoVectorEnv(SUITE, 1, image_size=256)
    config = ReflectorConfig(kind="prompted", folder=arguments.folder)
    reflector = ImageTextReflector(config, env.embodiment)
    (episode,) = env.demonstrate([Start(TASK, 0, 0)], noise=0.0, seed=0, record_every=8)
    frames = torch.as_tensor(episode.images[[0, -1]])[:, None]  # [2, 1, V, H, W, 3]
    judge, every = reflector.onlooker(1), torch.ones(1, dtype=torch.bool)
    for when, image in zip(("before", "after"), frames, strict=True):
        proprio = torch.as_tensor(episode.proprio[:1])
        reward = judge.watch(image, proprio, [episode.instruction], every)
        print(f"{when}: {float(reward[0]):.3f} that it is done: {episode.instruction}")
    env.close()


if __name__ == "__main__":
    main()
