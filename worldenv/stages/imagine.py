"""Videos of the same episode in both worlds: what happened, and what the simulator imagined.

A policy (or recorded actions) acts in the real benchmark; the simulator is then driven from the
first real frame, either by the very same actions or by the policy looking at its own imagination.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from worldenv.data.episode import Episode
from worldenv.data.windows import FrameSequence, chunk_sequences
from worldenv.envs.imagined import ImaginedVectorEnv, first_frames
from worldenv.envs.start import Start
from worldenv.models.policy import Policy
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.report.video import side_by_side, write_video
from worldenv.rl.rollout import rollout
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages.collect import EpisodeRecorder
from worldenv.stages.reflector import score
from worldenv.stages.replay import replay
from worldenv.stages.run import Run, write_json

FPS = 4.0


def real_episodes(run: Run, policy: Policy, starts: list[Start]) -> list[Episode]:
    """Deterministic real episodes of a policy, recorded once per chunk."""
    episodes: list[Episode] = []
    run.reality.roll_out(
        policy.eval(),
        starts,
        lambda env: EpisodeRecorder(run.config, starts, episodes.append, hold=0),
        seeds=[0] * len(starts),
        noise=None,
        terminate="never",
        record_every=run.config.env.chunk,
    )
    place = {(s.task, s.index, s.seed): k for k, s in enumerate(starts)}
    return sorted(episodes, key=lambda e: place[e.task, e.start, e.seed])


def imagine(
    run: Run,
    episodes: list[Episode],
    simulator: Simulator,
    reflector: Reflector,
    folder: Path,
    label: str,
    *,
    drive: Literal["actions", "policy"] = "actions",
    policy: Policy | None = None,
    steps: int = 1,
    keep: Callable[[Episode, np.ndarray], None] | None = None,
) -> list[Path]:
    """Write one side-by-side video per episode to folder; returns their paths.

    drive: "actions" replays the episode's own actions, "policy" lets the policy act on what it
    sees imagined. steps: denoising steps per frame. keep: is given every imagined episode and the
    judge's verdicts as rewards [T]. UserError where there is nothing to show.
    """
    if not episodes:
        raise UserError("imagine: expected at least one episode to show, got none.")
    if steps < 1:
        raise UserError(f"imagine: expected at least 1 denoising step per frame, got {steps}.")
    if drive == "policy" and policy is None:
        raise UserError("imagine: expected a policy to drive the imagined world, got none.")
    real = [_longest(chunk_sequences([e], run.config.env.chunk)) for e in episodes]
    seed = derive(run.config.seed, "imagine", label)
    if drive == "actions":
        imagined = replay(simulator, real, steps, seed)
    else:
        policy = policy.to(run.device)
        imagined = [_act(run, s, simulator, reflector, policy, steps, seed) for s in real]
    verdicts = score(reflector, real), score(reflector, imagined)
    paths = []
    for k, (episode, r, i) in enumerate(zip(episodes, real, imagined, strict=True)):
        notes = tuple([f"R {float(v):.2f}" for v in verdict[k]] for verdict in verdicts)
        frames = side_by_side(r.images.numpy(), i.images.numpy(), notes=notes)
        path = write_video(folder / f"{label}-{k}.mp4", frames, FPS)
        if keep is not None:
            keep(*_recorded(episode, i, verdicts[1][k].numpy(), float(reflector.threshold), drive))
        outcome = "success" if episode.success else "failure"
        how = "the same actions" if drive == "actions" else "the policy acting in its imagination"
        write_json(
            path.with_suffix(".json"),
            {
                "title": f"{label}: start {episode.start}, {outcome} in reality",
                "caption": f"{episode.instruction}. Imagined from the first frame by {how}; "
                f"R is the reflector's reward.",
            },
        )
        paths.append(path)
    return paths


def _recorded(
    real: Episode, sequence: FrameSequence, verdict: np.ndarray, threshold: float, drive: str
) -> tuple[Episode, np.ndarray]:
    """An imagined sequence as an episode that began as `real` did, and its rewards [T]: what the
    judge said of a frame, at the action that led there. Success is a verdict above `threshold`.
    """
    steps = (sequence.steps - sequence.steps[0]).numpy()
    chunks = sequence.actions.numpy()
    actions = [chunk[:n] for chunk, n in zip(chunks, np.diff(steps), strict=True)]
    rewards = np.zeros(steps[-1], np.float32)
    rewards[steps[1:] - 1] = verdict[1:]
    dones = rewards > threshold
    episode = Episode(
        benchmark=real.benchmark,
        suite=real.suite,
        task=real.task,
        instruction=sequence.instruction,
        start=real.start,
        seed=real.seed,
        source="imagined",
        actions=np.concatenate(actions).astype(np.float32),
        dones=dones,
        frame_steps=steps,
        images=sequence.images.numpy(),
        proprio=sequence.proprio.numpy(),
        success=bool(dones.any()),
        meta={"driven_by": drive, "threshold": threshold, "from_step": int(sequence.steps[0])},
    )
    return episode, rewards


def _longest(sequences: list[FrameSequence]) -> FrameSequence:
    return max(sequences, key=len)


@torch.no_grad()
def _act(
    run: Run,
    sequence: FrameSequence,
    simulator: Simulator,
    reflector: Reflector,
    policy: Policy,
    steps: int,
    seed: int,
) -> FrameSequence:
    """The policy's own imagined episode from a sequence's first frame."""
    env = ImaginedVectorEnv(
        simulator.for_generation(),
        reflector,
        first_frames([sequence]),
        1,
        max_chunks=run.config.max_chunks,
        sampling_steps=steps,
    )
    images, poses, actions = [sequence.images[0]], [sequence.proprio[0]], []

    def note(rows, before, action, after, info) -> None:
        images.append(after["image"][0].cpu().clone())
        poses.append(after["proprio"][0].cpu().clone())
        actions.append(action[0].cpu().clone())

    rollout(env, policy, [Start(0, 0, seed)], seeds=[0], noise=None, on_step=note, images=False)
    count = len(images)
    return FrameSequence(
        torch.stack(images),
        torch.stack(poses),
        torch.stack(actions),
        torch.zeros(count, dtype=torch.bool),
        torch.arange(count) * run.config.env.chunk,
        0,
        sequence.task,
        sequence.instruction,
    )
