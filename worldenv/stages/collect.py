"""Demonstrations and self-explored episodes from the real benchmark (World-Env section 3.2).

Demonstrations: scripted, noise on what is executed, clean labels, images at every step. Policy
episodes: with the noise of `exploration_noise`, images every few steps, recorded a little past
success so that the simulator and the reflector see what success looks like. Successes and failures
are both kept. Episodes already on disk are not collected again.
"""

import itertools
from collections.abc import Callable, Container, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldenv.config import Config
from worldenv.data.disk import Frames
from worldenv.data.embodiment import check_fits
from worldenv.data.episode import Episode, proprio_statistics
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.data.libero_hdf5 import LIBERO
from worldenv.data.reading import bytes_of, each_episode, on_disk
from worldenv.envs.start import Start
from worldenv.fields import fingerprint
from worldenv.models.policy import Policy
from worldenv.rl.noise import Noise, exploration
from worldenv.runtime import progress, ranks
from worldenv.runtime.device import GIB
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages import demonstrations, store
from worldenv.stages.reality import Reality, Watcher, benchmark, make_env
from worldenv.stages.run import Run, Stage, policy_before, stage_before


def world(config: Config) -> tuple:
    """What of the real benchmark results depend on: not where the assets come from, nor how many
    workers serve them."""
    env, name = config.env, benchmark(config).name
    of = () if name == LIBERO else (name,)  # what was made before there were others stays valid
    return (*of, env.suite, list(env.tasks), env.image_size, env.chunk, env.max_steps, env.views)


def demonstrate(run: Run, mark: str, number: int = 0) -> dict:
    """Stage `demonstrations`: scripted episodes on starts 0, 1, ... of every task, or files."""
    config = run.config
    if config.data.paths:
        return ranks.together(lambda: demonstrations.from_files(run, mark))
    folder = run.path("data", "demonstrations")
    return record_expert(config, config.collect.demonstrations, folder, mark)


def explore(run: Run, mark: str, number: int) -> dict:
    """Stage `explore-N`: episodes of the current policy, successes and failures."""
    collect = run.config.collect
    count = collect.refresh_episodes if number else collect.episodes
    folder = run.path("data", f"explore-{number}")
    path = run.path("checkpoints", f"{policy_before(number)}.safetensors")
    policy = store.load("policy", path, run.acting)
    return record_policy(run.reality, policy, count, folder, mark, number)


def _demonstrated(config: Config, number: int) -> tuple:
    """What demonstrations depend on: the files they come from, or how they are scripted."""
    if config.data.paths:
        return (world(config), demonstrations.identity(config))
    part = config.collect
    return (world(config), part.demonstrations, part.demonstration_noise)


DEMONSTRATIONS = Stage(
    "demonstrations",
    demonstrate,
    settings=_demonstrated,
    makes=("data/demonstrations",),
    rounds=False,
)
EXPLORE = Stage(
    "explore",
    explore,
    wanted=lambda config: config.learned,
    settings=lambda config, n: (world(config), config.collect),
    needs=lambda config, n: (stage_before(n),),
    makes=("data/explore-{n}",),
)


def record_expert(config: Config, count: int, folder: Path, mark: str = "") -> dict:
    """`count` scripted episodes of every task into folder; returns how many of them it then holds,
    and their successes and steps.

    mark: a stage's fingerprint; the folder may hold nothing else then. By default the folder is the
    user's, is only added to, and the mark is of who acts, how and where. It is stored with each
    episode: one of another mark is none of them.
    """
    demonstrations.require_expert(config)
    most = benchmark(config).states
    if count > most:
        raise UserError(
            f"--episodes: expected at most {most} demonstrations of a task, one for each numbered "
            f"start that {benchmark(config).name} has of it, got {count}. Ask for fewer."
        )
    alone = bool(mark)
    mark = mark or fingerprint(
        "expert", config.seed, world(config), config.collect.demonstration_noise
    )
    starts = [
        Start(task, index, derive(config.seed, "fixture", task, index) % 2**31)
        for task in config.env.tasks
        for index in range(count)
    ]
    missing = ranks.together(lambda: left_to_record(folder, mark, starts, alone))
    env = make_env(config, config.env.workers)
    try:
        with DatasetWriter(folder) as writer, progress.bar(len(starts), "demonstrations") as bar:
            bar.update(len(starts) - len(missing))
            at_once = config.env.workers * ranks.count()
            for first in range(0, len(missing), at_once):
                batch = missing[first : first + at_once]
                own = env.demonstrate(
                    batch[ranks.share(len(batch))],
                    noise=config.collect.demonstration_noise,
                    seed=derive(config.seed, "demonstration"),
                    attempts=4,
                )
                for episode in itertools.chain(*ranks.gather(list(own))):
                    episode.meta["mark"] = mark
                    if ranks.lead():  # in their order, which is that of training
                        writer.append(episode)
                    bar.advance()
    finally:
        env.close()
    return ranks.together(lambda: _counts(folder, mark))


def record_policy(
    reality: Reality, policy: Policy, count: int, folder: Path, mark: str = "", number: int = 0
) -> dict:
    """`count` sampled policy episodes of every task into folder; returns and takes what
    `record_expert` does. By default the mark is of the policy's weights and the configuration.
    """
    config, alone = reality.config, bool(mark)
    mark = mark or fingerprint(
        store.digest(policy), config.seed, world(config), recording(config), number
    )
    starts = [
        exploration_start(config, task, number, k)
        for task in config.env.tasks
        for k in range(count)
    ]
    missing = ranks.together(lambda: left_to_record(folder, mark, starts, alone))
    if missing:
        _roll_out(reality, policy, missing, folder, mark, number)
    return ranks.together(lambda: _counts(folder, mark))


def _roll_out(
    reality: Reality, policy: Policy, starts: list[Start], folder: Path, mark: str, number: int
) -> None:
    config = reality.config
    hold = config.collect.hold_chunks * config.env.chunk
    won = 0
    writes = DatasetWriter(folder, alone=ranks.lead())
    with writes as writer, progress.bar(len(starts), folder.name) as bar:

        def keep(record: Episode) -> None:
            nonlocal won
            record.meta["mark"] = mark
            writer.append(record)
            won += record.success
            bar.advance(successes=won)

        reality.roll_out(
            policy.eval(),
            starts,
            lambda env: EpisodeRecorder(config, starts, keep, hold),
            seeds=[derive(config.seed, "explore", number, s.task, s.seed) for s in starts],
            noise=exploration_noise(config, policy),
            terminate="never",
            record_every=config.collect.record_every,
        )
        written = ranks.gather(writer.files)
        if ranks.lead():  # which merges them all, now that no rank adds any more
            writer.open(*itertools.chain(*written))


def exploration_noise(config: Config, policy: Policy) -> Noise:
    """How the policy explores the real benchmark."""
    moves = policy.embodiment.actions("translate")
    return exploration(policy.distribution, config.collect, moves)


def recording(config: Config) -> tuple:
    """How a policy's episodes are made: its noise, which frames are kept, when they end."""
    part = config.collect
    noise = (part.push, 0 if part.push else part.scale, part.temperature)
    return (*noise, part.record_every, part.hold_chunks)


def _counts(folder: Path, mark: str) -> dict:
    counts = {"episodes": 0, "successes": 0, "steps": 0}
    for e in each_episode(folder):
        if e.meta.get("mark") == mark:
            counts["episodes"] += 1
            counts["successes"] += e.success
            counts["steps"] += len(e)
    return counts


class EpisodeRecorder(Watcher):
    """Builds an `Episode` of the chunks of each and gives it to `keep`."""

    def __init__(
        self, config: Config, starts: Sequence[Start], keep: Callable[[Episode], None], hold: int
    ) -> None:
        """hold: actions still recorded after success first fired."""
        self.config, self.starts, self.keep, self.hold = config, starts, keep, hold
        self.benchmark = benchmark(config).name
        self.open: dict[str, list] = {}

    def step(self, episode: int, before: dict, action: Tensor, after: dict, info: dict) -> None:
        """Note a chunk."""
        parts = self.open
        if not parts:
            for name in ("image", "proprio"):
                parts[name] = [before[name][0].numpy().copy()]
            parts |= {"steps": [0], "action": [], "dones": []}
            parts["instruction"] = [before["instruction"][0]]
        done = int(info["steps"][0]) - parts["steps"][-1]
        parts["action"].append(action[0, :done].cpu().numpy())
        frames = info["frames"][0]
        parts["dones"].append(frames["dones"])
        for name in ("image", "proprio", "steps"):
            parts[name].extend(frames[name])

    def stop(self, observation: dict, info: dict, live: np.ndarray) -> np.ndarray:
        """Rows that have been recorded long enough."""
        return info["success"] & (info["steps"] >= info["success_step"] + self.hold)

    def finish(self, episode: int, info: dict) -> None:
        """Keep the episode."""
        parts, start = self.open, self.starts[episode]
        self.open = {}
        self.keep(
            Episode(
                benchmark=self.benchmark,
                suite=self.config.env.suite,
                task=start.task,
                instruction=parts["instruction"][0],
                start=start.index,
                seed=start.seed,
                source="policy",
                actions=np.concatenate(parts["action"]).astype(np.float32),
                dones=np.concatenate(parts["dones"]),
                frame_steps=np.array(parts["steps"]),
                images=np.stack(parts["image"]),
                proprio=np.stack(parts["proprio"]),
                success=bool(info["success"]),
            )
        )


def exploration_start(config: Config, task: int, number: int, k: int) -> Start:
    """The k-th that a task explores from in a round: the benchmark's tuning starts in turn, and
    fresh placements for a fraction of the episodes."""
    seed = derive(config.seed, "exploration fixture", number, task, k) % 2**31
    before, after = (int(n * config.collect.fresh) for n in (k, k + 1))
    tuning = benchmark(config).tuning
    return Start(task, None if after > before else (k - before) % tuning, seed)


def left_to_record(folder: Path, mark: str, starts: list[Start], alone: bool) -> list[Start]:
    """Starts that folder has no episode of yet that was recorded under `mark`.

    alone: whether it may hold no others (what a run trains on). UserError if it does: what another
    configuration recorded there has been moved aside, so nobody knows whose they are.
    """
    done, others = set(), 0
    for e in each_episode(folder):
        if e.meta.get("mark") == mark:
            done.add((e.task, e.start, e.seed))
        else:
            others += 1
    if alone and others:
        raise UserError(
            f"{folder} holds {others} episodes that no run recorded. Move them "
            "elsewhere, or choose another run_dir."
        )
    return [s for s in starts if (s.task, s.index, s.seed) not in done]


def split_held_out(episodes: list[Episode], fraction: float) -> tuple[list[Episode], list[Episode]]:
    """(training, held-out) episodes: every n-th is held out, whatever came of it."""
    every = round(1 / fraction) if fraction else 0
    held = [bool(every) and i % every == every - 1 for i in range(len(episodes))]
    return (
        [e for e, h in zip(episodes, held, strict=True) if not h],
        [e for e, h in zip(episodes, held, strict=True) if h],
    )


def load_round(
    run: Run, number: int, tasks: Container[int] | None = None
) -> tuple[list[Episode], list[Episode], list[Episode]]:
    """(demonstrations, policy episodes to train on, held-out policy episodes) up to a round, of all
    tasks or of some."""
    demonstrations = recorded(run, "demonstrations")
    train: list[Episode] = []
    held_out: list[Episode] = []
    for n in range(number + 1):
        episodes = recorded(run, f"explore-{n}")
        episodes.sort(key=lambda e: (e.task, e.seed))  # whatever order they were finished in
        a, b = split_held_out(episodes, run.config.collect.held_out)
        train, held_out = train + a, held_out + b
    if tasks is not None:
        demonstrations, train, held_out = (
            [e for e in part if e.task in tasks] for part in (demonstrations, train, held_out)
        )
    return demonstrations, train, held_out


def recorded(run: Run, name: str) -> list[Episode]:
    """Episodes in `data/<name>` of a run. UserError if they are of another benchmark or robot."""
    folder, most = run.dir / "data" / name, run.config.data.memory
    size = bytes_of(folder) / GIB
    if size > most:
        _say(f"{name}: {size:.3g} GiB, more than --data.memory {most:g}: read as they are drawn")
        episodes = on_disk(folder, run.embodiment.image_size)
    else:
        episodes = read_episodes(folder, run.embodiment.image_size)
    for number, episode in enumerate(episodes):
        of, own = (episode.benchmark, episode.suite), (run.benchmark.name, run.config.env.suite)
        if of != own:
            raise UserError(
                f"{folder}: episode {number}: expected one of {' '.join(own)}, got one of "
                f"{' '.join(of)}. Move it elsewhere, or choose another run_dir."
            )
        images, views = episode.images, run.embodiment.V  # others may be recorded beside them
        episode.images = images.views(views) if isinstance(images, Frames) else images[:, :views]
        check_fits(episode, run.embodiment, f"{folder}: episode {number}")
    return episodes


@cache
def _say(line: str) -> None:
    """Once, though every stage reads them."""
    print(line, flush=True)


def statistics(episodes: list[Episode]) -> tuple[Tensor, Tensor]:
    """Proprio mean and standard deviation over frames."""
    mean, std = proprio_statistics(episodes)
    return torch.from_numpy(mean), torch.from_numpy(std)
