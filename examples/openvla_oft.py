"""One decision of a published OpenVLA-OFT policy in real LIBERO.

    python examples/openvla_oft.py models/openvla-7b-oft-finetuned-libero-spatial

Prints the chunk of actions that the robot would execute, and how sure the policy is of them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from worldenv.config import PolicyConfig
from worldenv.envs.libero.env import LiberoVectorEnv
from worldenv.envs.start import Start
from worldenv.models import openvla_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the published folder, as downloaded")
    parser.add_argument("--task", type=int, default=8, help="of libero_spatial, 0 to 9")
    arguments = parser.parse_args()

    env = LiberoVectorEnv("libero_spatial", 1, image_size=256)
    config = PolicyConfig(kind="openvla-oft", folder=arguments.folder)
    policy = openvla_folder.load(config, env.embodiment, train=False)
    observation, _ = env.reset(options={"starts": [Start(arguments.task, 0, 0)]})
    with torch.no_grad():
        mu, log_scale = policy(
            {
                key: torch.as_tensor(x) if key != "instruction" else x
                for key, x in observation.items()
            }
        )
    print(observation["instruction"][0])
    np.set_printoptions(precision=3, suppress=True)
    print("actions (hand in 6 directions, gripper: -1 opens, +1 closes):")
    print(policy.command(mu)[0].numpy())
    print(f"scale of its Laplace distribution: {log_scale.exp().mean():.3f} of its own units")
    env.close()


if __name__ == "__main__":
    main()
