"""Whether worldenv in LeRobot does what it does without: run once in LeRobot's venv, with a run.

    THEIRS/bin/python -m bench.lerobot_plugins RUN --episodes 8

THEIRS has lerobot[dataset,evaluation], worldenv and plugins/lerobot (its README says how), and for
LeRobot's own LIBERO what worldenv's extra `libero` has. Compared, bit for bit:

    policy   chunks of actions, from real frames that went through LeRobot's preprocessing
    reward   the reflector's R of every frame of recorded episodes
    world    `lerobot-eval` of the policy in the imagined world: every episode's success and reward
    libero   `lerobot-eval` of the policy in LeRobot's LIBERO, and worldenv on the same starts: what
             the two show at the first moment, the action it leads to, and every episode's success

Writes results/lerobot/plugins.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.envs.imagined import ImaginedVectorEnv
from worldenv.envs.start import Start
from worldenv.play.session import open_world
from worldenv.rl.rollout import rollout
from worldenv.runtime import device as devices
from worldenv.runtime.revision import commit
from worldenv.stages import store
from worldenv.stages.collect import load_round
from worldenv.stages.evaluate import evaluate_policy
from worldenv.stages.reality import make_env
from worldenv.stages.run import Run, open_run, write_json

OUT = Path(__file__).parents[1] / "results" / "lerobot" / "plugins.json"
SEED = 1000  # lerobot-eval's own
SIDE = 128  # of LIBERO's pictures, as worldenv renders them
PACKAGES = ("lerobot", "torch", "numpy", "gymnasium")
LIBERO = ("mujoco", "robosuite", "hf-libero")


def arguments_of(run: Run, env: list[str], episodes: int, out: Path) -> list[str]:
    """Of lerobot-eval; the world's rows are imagined together, reality's one after the other."""
    return [
        "--policy.type=worldenv",
        f"--policy.checkpoint={run.dir}",
        "--policy.device=cpu",
        *env,
        f"--eval.n_episodes={episodes}",
        f"--seed={SEED}",
        f"--output_dir={out}",
    ]


def lerobot_eval(command: list[str], out: Path) -> dict:
    """What it says of every episode."""
    subprocess.run(command, check=True)
    (task,) = json.loads((out / "eval_info.json").read_text())["per_task"]
    return task["metrics"]


def batch_of(image: Tensor, state: Tensor, words: list[str]) -> dict[str, Any]:
    """Frames `[B, V, H, W, 3]` as LeRobot's loop hands them to a policy."""
    from lerobot.envs import preprocess_observation

    pixels = {name: image[:, v].numpy().copy() for v, name in enumerate(("image", "image2"))}
    return preprocess_observation({"pixels": pixels, "agent_pos": state.numpy()}) | {"task": words}


def frames_of(sequences: list[FrameSequence]) -> list[dict[str, Any]]:
    """Observations of one row, as worldenv's models are shown them."""
    return [
        {
            "image": s.images[t : t + 1],
            "proprio": s.proprio[t : t + 1],
            "instruction": (s.instruction,),
        }
        for s in sequences
        for t in range(len(s))
    ]


@torch.no_grad()
def compare_policy(run: Run, policy: torch.nn.Module, sequences: list[FrameSequence]) -> dict:
    """Chunks by LeRobot's way, and by ours."""
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot_policy_worldenv.configuration_worldenv import WorldenvConfig, WorldenvWorldConfig

    config = WorldenvConfig(checkpoint=str(run.dir), device="cpu")
    theirs = make_policy(config, env_cfg=WorldenvWorldConfig(run=str(run.dir)))
    before, after = make_pre_post_processors(config)
    worst, equal, frames = 0.0, 0, frames_of(sequences)
    for seen in frames:
        batch = before(batch_of(seen["image"], seen["proprio"], list(seen["instruction"])))
        theirs.reset()
        actions = torch.stack(
            [after(theirs.select_action(batch)) for _ in range(run.config.env.chunk)], 1
        )
        own = policy.command(policy(seen)[0])
        worst = max(worst, float((actions - own).abs().max()))
        equal += torch.equal(actions, own)
    return {"observations": len(frames), "equal_to_the_bit": equal, "largest_difference": worst}


def compare_reward(run: Run, reflector: torch.nn.Module, sequences: list[FrameSequence]) -> dict:
    """Rewards by LeRobot's way, and by ours."""
    from lerobot.rewards import make_reward_model
    from lerobot_policy_worldenv.configuration_worldenv import WorldenvReflectorConfig

    theirs = make_reward_model(WorldenvReflectorConfig(checkpoint=str(run.dir), device="cpu"))
    every, worst, equal, count = torch.ones(1, dtype=torch.bool), 0.0, 0, 0
    for sequence in sequences:
        theirs.reset()
        judge = reflector.onlooker(1)
        for seen in frames_of([sequence]):
            batch = batch_of(seen["image"], seen["proprio"], list(seen["instruction"]))
            reward, own = theirs.compute_reward(batch), judge.watch(*seen.values(), every)
            worst = max(worst, float((reward - own).abs().max()))
            equal, count = equal + torch.equal(reward, own), count + 1
    return {"frames": count, "equal_to_the_bit": equal, "largest_difference": worst}


def compare_world(run: Run, policy: torch.nn.Module, episodes: int, folder: Path) -> dict:
    """`lerobot-eval` in the imagined world, and our rollout of the same starts."""
    from lerobot_policy_worldenv.world import worlds

    rows = min(4, episodes)
    env = ["--env.type=worldenv_world", f"--env.run={run.dir}", "--env.device=cpu"]
    own = [f"--eval.batch_size={rows}"]
    command = [str(Path(sys.executable).parent / "lerobot-eval")]
    found = lerobot_eval(command + arguments_of(run, env, episodes, folder) + own, folder)
    ((made,),) = ([*tasks.values()] for tasks in worlds(str(run.dir), None, "cpu", 1).values())
    world, outcomes = open_world(run), []
    for first in range(0, episodes, rows):
        ours = ImaginedVectorEnv(
            world.simulator,
            world.reflector,
            made.contexts,
            rows,
            max_chunks=run.config.max_chunks,
            sampling_steps=world.passes,
        )
        starts = [made.start(SEED + first + row) for row in range(rows)]
        done = rollout(ours, policy, starts, seeds=[0] * rows, noise=None, images=False)
        top = torch.zeros(rows).scatter_reduce_(0, done.episode, done.reward, "amax")
        outcomes += zip(done.terminated.tolist(), top.tolist(), strict=True)
    theirs = list(zip(found["successes"], found["max_rewards"], strict=True))[:episodes]
    return {
        "episodes": episodes,
        "rows": rows,
        "successes_lerobot": sum(won for won, _ in theirs),
        "successes_worldenv": sum(won for won, _ in outcomes),
        "same_success": sum(a == b for (a, _), (b, _) in zip(theirs, outcomes, strict=True)),
        "same_highest_reward_to_the_bit": sum(
            a == b for (_, a), (_, b) in zip(theirs, outcomes, strict=True)
        ),
        "seeds": [SEED, SEED + episodes - 1],
        "videos": len(found["video_paths"]),
    }


def their_libero(argv: list[str]) -> None:
    """`lerobot-eval` where LIBERO finds the assets that worldenv uses, and its light arm."""
    dress_libero()
    from lerobot.scripts.lerobot_eval import main

    sys.argv = ["lerobot-eval", *argv]
    main()


def dress_libero() -> None:
    """Point LIBERO at our primitive pack, and have the arm drawn light: what the policy knows."""
    from worldenv.envs.libero.assets import configure_libero, resolve_assets, robot_for

    path = resolve_assets(None, "libero_spatial").path
    configure_libero(path)
    robot_for(path)  # makes the light arm known
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS

    REGISTERED_ROBOTS["MountedPanda"] = REGISTERED_ROBOTS["MountedLightPanda"]


def libero_arguments(run: Run) -> list[str]:
    """The run's one task in LeRobot's LIBERO, as long and as large as worldenv has it."""
    (task,) = run.config.env.tasks
    return [
        "--env.type=libero",
        f"--env.task={run.config.env.suite}",
        f"--env.task_ids=[{task}]",
        f"--env.episode_length={run.config.env.max_steps}",
        f"--env.observation_height={SIDE}",
        f"--env.observation_width={SIDE}",
        "--eval.batch_size=1",
    ]


def compare_libero(run: Run, policy: torch.nn.Module, episodes: int, folder: Path) -> dict:
    """`lerobot-eval` in LeRobot's LIBERO, whose k-th episode begins at init state k, and ours."""
    command = [sys.executable, "-m", "bench.lerobot_plugins", "--libero-eval"]
    arguments = arguments_of(run, libero_arguments(run), episodes, folder)
    theirs = lerobot_eval(command + arguments, folder)["successes"][:episodes]
    (task,) = run.config.env.tasks
    starts = [Start(task, k, SEED + k) for k in range(episodes)]
    outcomes = evaluate_policy(run, policy, starts, "worldenv")
    own = {o["start"]: o["success"] for o in outcomes}
    return {
        "episodes": episodes,
        "init_states": [0, episodes - 1],
        "seeds": [SEED, SEED + episodes - 1],
        "successes_lerobot": sum(map(bool, theirs)),
        "successes_worldenv": sum(own.values()),
        "same_success": sum(bool(a) == own[k] for k, a in enumerate(theirs)),
        "by_start_lerobot": list(map(bool, theirs)),
        "by_start_worldenv": [own[k] for k in range(episodes)],
        "first_moment": first_moment(run, policy, starts[: min(3, episodes)]),
    }


@torch.no_grad()
def first_moment(run: Run, policy: torch.nn.Module, starts: list[Start]) -> dict:
    """How far apart the two show the same start, and what the policy then does."""
    dress_libero()
    from lerobot.envs.configs import LiberoEnv
    from lerobot.envs.utils import preprocess_observation
    from lerobot_policy_worldenv.skin import Skin

    suite, (task,) = run.config.env.suite, run.config.env.tasks
    config = LiberoEnv(task=suite, task_ids=[task], observation_height=SIDE, observation_width=SIDE)
    theirs, before = config.create_envs(1)[suite][task], config.get_env_processors()[0]
    keys = ("observation.images.image", "observation.images.image2")
    skin = Skin(run.embodiment, dict.fromkeys(keys, (3, SIDE, SIDE)), [], "")
    worst: dict[str, float] = dict.fromkeys(("image_mean", "image_max", "state", "action"), 0.0)
    with closing(theirs), closing(make_env(run.config)) as ours:
        for start in starts:
            raw, _ = theirs.reset(seed=[start.seed])
            batch = before(preprocess_observation(raw))
            batch["task"] = list(theirs.call("task_description"))
            seen = skin.observation(batch, torch.device("cpu"))
            own, _ = ours.reset(options={"starts": [start]})
            own = {k: v if k == "instruction" else torch.as_tensor(v) for k, v in own.items()}
            assert seen["instruction"] == tuple(own["instruction"])
            apart = (seen["image"].float() - own["image"].float()).abs()
            acts = (policy.command(policy(view)[0]) for view in (seen, own))
            for name, value in (
                ("image_mean", apart.mean()),
                ("image_max", apart.max()),
                ("state", (seen["proprio"] - own["proprio"]).abs().max()),
                ("action", next(acts).sub(next(acts)).abs().max()),
            ):
                worst[name] = max(worst[name], float(np.format_float_positional(value, 4)))
    return {"starts": len(starts), **{f"{k}_apart_at_most": v for k, v in worst.items()}}


def main() -> None:
    """Compares, prints and writes the file."""
    if sys.argv[1:2] == ["--libero-eval"]:
        return their_libero(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a finished run of one task of LIBERO")
    parser.add_argument("--episodes", type=int, default=8, help="in the world and in LIBERO")
    parser.add_argument("--recorded", type=int, default=6, help="episodes to compare frames of")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--without-libero", action="store_true")
    given = parser.parse_args()
    packages = PACKAGES if given.without_libero else (*PACKAGES, *LIBERO)
    with closing(open_run(given.run, device="cpu")) as run, tempfile.TemporaryDirectory() as name:
        last = run.config.posttrain.rounds - 1
        policy, reflector = (
            store.load(kind, run.dir / "checkpoints" / f"{kind}-{last}.safetensors")
            for kind in ("policy", "reflector")
        )
        _, explored, _ = load_round(run, last)
        recorded = from_first_step(
            chunk_sequences(explored[: given.recorded], run.config.env.chunk)
        )
        found: dict[str, Any] = {
            "command": f"python -m bench.lerobot_plugins RUN --episodes {given.episodes}",
            "run": {k: getattr(run.config, k) for k in ("preset", "seed")} | {"rounds": last + 1},
            "commit": commit(),
            "versions": {name: version(name) for name in packages},
            "machine": devices.describe(),
            "policy": compare_policy(run, policy, recorded),
            "reward": compare_reward(run, reflector, recorded),
        }
        print(json.dumps(found, indent=1), flush=True)
        found["world"] = compare_world(run, policy, given.episodes, Path(name) / "world")
        print(json.dumps(found["world"], indent=1), flush=True)
        if not given.without_libero:
            found["libero"] = compare_libero(run, policy, given.episodes, Path(name) / "libero")
    write_json(given.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
