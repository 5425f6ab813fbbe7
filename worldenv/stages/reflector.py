"""Train the reflector on real frames and on imagined replays of them (World-Env section 3.4).

The replays (the simulator driven by an episode's real actions) carry the real labels, so that the
reflector learns to judge the frames it will be shown in post-training. Then its two thresholds are
calibrated (thresholds.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.data.episode import Episode
from worldenv.data.windows import FrameSequence, chunk_sequences, draw, from_first_step
from worldenv.models.layers import views_to_channels
from worldenv.models.policy import augment
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime import parallel, sharding
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import store, thresholds, training
from worldenv.stages.collect import load_round
from worldenv.stages.features import DROPOUT, LATE_START, Features, encoded
from worldenv.stages.replay import padded, replay
from worldenv.stages.run import Run, Stage, data_up_to, policy_before, stage_before, world_of


def run(run: Run, mark: str, number: int, policy_path: Path) -> dict:
    """Stage `reflector-N`: writes checkpoints/reflector-N.safetensors.

    Later rounds continue from the weights of the round before, on all episodes so far.
    policy_path: of the policy that explored in this round.
    """
    config, part = run.config, run.config.reflector
    demonstrations, explored, _ = load_round(run, number)
    simulator_path = run.path("checkpoints", f"{world_of(config, number)}.safetensors")
    shown, own = ([*demonstrations, *explored], explored) if part.explored else [demonstrations] * 2
    reflector = training.begin(run, "reflector", number, shown)
    learned = {}
    if any(p.requires_grad for p in reflector.parameters()):  # of a prompted one nothing is trained
        reflector, learned = _learn(run, mark, number, reflector, simulator_path, shown, own)
    if part.calibrate and explored:
        simulator = store.load("simulator", simulator_path, run.device)
        policy = store.load("policy", policy_path, run.device)
        learned |= thresholds.imagined(run, number, policy, simulator, reflector)
        reflector.threshold.fill_(learned["threshold"])
        learned |= calibrate_on_real(run, number, reflector, explored)
    name = f"reflector-{number}"
    path = run.path("checkpoints", f"{name}.safetensors")
    store.save("reflector", reflector, path, config.env)
    training.finish(run, name)
    etas = {
        eta: round(float(getattr(reflector, eta)), 4) for eta in ("threshold", "real_threshold")
    }
    return {**learned, **etas}


def _learn(
    run: Run,
    mark: str,
    number: int,
    reflector: Reflector,
    simulator_path: Path,
    episodes: list[Episode],
    replayed: list[Episode],
) -> tuple[Reflector, dict]:
    """Train on the frames of episodes, and of some imagined again: the reflector, and what of it is
    recorded."""
    config, part = run.config, run.config.reflector
    sequences, own = (chunk_sequences(e, config.env.chunk) for e in (episodes, replayed))
    simulator: Simulator = store.load("simulator", simulator_path, run.device)
    passes = config.sampling_steps(number)
    seed = derive(config.seed, "reflector replay", number)
    imagined = replay(simulator, from_first_step(own), passes, seed)
    del simulator
    shown = [*sequences, *imagined]
    data = padded(shown, run.device)
    frames = Features(run, reflector, shown, data) if reflector.frozen else _Pictures(data)
    sampler = _BalancedFrames(data, [s.task for s in shown])
    size = training.shard_size(run, part.batch)
    reflector = sharding.shard(reflector, "reflector" in config.fsdp)

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        g = generator(config.seed, "reflector", number, step, shard)
        rows, ends, labels = sampler.draw(size, g)
        logits = frames.judge(reflector, rows, ends, g)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        right = ((logits > 0) == (labels > 0.5)).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": right}

    steps = part.refresh_steps if number else part.steps
    tail = training.train(
        run,
        f"reflector-{number}",
        mark,
        reflector,
        loss_at,
        steps=steps,
        lr=part.lr,
        weight_decay=0.05,
    )
    return sharding.gathered(reflector), {
        "sequences": len(sequences),
        "imagined_sequences": len(imagined),
        "positives": int((data["success"] & data["valid"]).sum()),
        "negatives": int((~data["success"] & data["valid"]).sum()),
        **tail,
    }


STAGE = Stage(
    "reflector",
    lambda run_, mark, n: run(
        run_, mark, n, run_.path("checkpoints", f"{policy_before(n)}.safetensors")
    ),
    settings=lambda config, n: (
        config.reflector,
        config.sampling_steps(n),
        "two thresholds",  # one that was made before real frames had theirs is made anew
        *store.digests(config.reflector),
    ),
    needs=lambda config, n: (
        *data_up_to(n),
        stage_before(n),
        world_of(config, n),
        *((f"reflector-{n - 1}",) if n else ()),
    ),
    makes=("checkpoints/reflector-{n}.safetensors",),
    wanted=lambda config: config.learned,
)

NEAR = 4  # frames before success, or before a failure's end, that are nearly one


class _BalancedFrames:
    """Draws frames, each with a first frame of its episode: a third successes, a third near misses
    (what a reflector must not mistake for success is rare among all frames), a third any failures.

    Of each kind all tasks have the same share: where one succeeds often and another never, the
    instruction would else tell the answer. tasks: of the episodes, by default one.
    """

    def __init__(self, data: dict, tasks: Sequence[int] = ()) -> None:
        self.data = data
        success, valid = data["success"], data["valid"]
        length = valid.sum(1)
        first = torch.where(success.any(1), success.float().argmax(1), length)[:, None]
        frame = torch.arange(valid.shape[1], device=valid.device)
        near = (frame < first) & (frame >= first - NEAR) & valid & ~success
        self.pools = [x.nonzero() for x in (success & valid, near, valid & ~success)]
        own = torch.tensor(tasks).to(valid.device)
        self.weights = [_by_task(own[p[:, 0]]) if len(set(tasks)) > 1 else None for p in self.pools]

    def draw(self, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(episode [B], frame [B], label [B])."""
        each = zip(self.pools, self.weights, strict=True)
        pools = [(pool, w, float(i == 0)) for i, (pool, w) in enumerate(each) if len(pool)]
        picks, labels = [], []
        for i, (pool, weights, label) in enumerate(pools):
            n = batch * (i + 1) // len(pools) - batch * i // len(pools)
            picks.append(pool[draw(g, n, len(pool), weights)])
            labels.append(torch.full((n,), label))
        chosen = torch.cat(picks)
        return chosen[:, 0], chosen[:, 1], torch.cat(labels).to(chosen.device)


def _by_task(tasks: Tensor) -> Tensor:
    """Running sum of the weights `[N]` by which each of tasks `[N]` is drawn as often as the
    others."""
    _, own, count = tasks.cpu().unique(return_inverse=True, return_counts=True)
    return (1 / count.double()[own]).cumsum(0)


class _Pictures:
    """The frames themselves, for a reflector that learns to see them."""

    def __init__(self, data: dict) -> None:
        self.data = data

    def judge(self, reflector: Reflector, rows: Tensor, ends: Tensor, g: torch.Generator) -> Tensor:
        """Logits `[B]` of frames `ends` in episodes `rows`, augmented."""
        late = torch.rand(len(rows), generator=g) < LATE_START
        first = (torch.rand(len(rows), generator=g) * late).to(ends.device) * ends
        frames = torch.stack([first.long(), ends], 1)  # [B, 2]
        image = self.data["images"][rows[:, None], frames].flatten(0, 1)
        proprio = self.data["proprio"][rows[:, None], frames].flatten(0, 1)
        views = augment(views_to_channels(image), 1, g)
        noise = 0.1 * torch.rand(1, len(image), 1, 1, 1, generator=g)
        views = views + noise.to(views.device) * torch.randn(views.shape, generator=g).to(
            views.device
        )
        jitter = 0.05 * torch.randn(proprio.shape, generator=g).to(proprio.device)
        proprio = proprio + jitter * reflector.proprio_std
        features = reflector.features(views, proprio).unflatten(0, (len(rows), 2))
        words = reflector.words([self.data["instruction"][r] for r in rows.tolist()])
        keep = torch.rand(len(rows), reflector.config.width, generator=g).to(features.device)
        return reflector.judge(features[:, 1], features[:, 0], words, keep > DROPOUT)


def calibrate_on_real(run: Run, number: int, judge: Reflector, explored: list[Episode]) -> dict:
    """Puts the threshold for real frames, of an older reflector too, by the episodes trained on;
    what of it is recorded."""
    own = from_first_step(chunk_sequences(explored, run.config.env.chunk))
    found = thresholds.peaks(rewards(run, judge, own), own)
    record = thresholds.real(found, derive(run.config.seed, "real threshold interval", number))
    judge.real_threshold.fill_(record["real_threshold"])
    return record


def rewards(run: Run, reflector: Reflector, own: list[FrameSequence]) -> list[Tensor]:
    """R `[F]` of sequences that were trained on, from features that were kept if there are any."""
    if not reflector.frozen or not any(p.requires_grad for p in reflector.parameters()):
        return score(reflector, own)
    device = reflector.proprio_mean.device
    with torch.no_grad():
        return [
            torch.sigmoid(reflector.judge(seen.whole.to(device), s.proprio.to(device))).cpu()
            for seen, s in zip(encoded(run, reflector, own), own, strict=True)
        ]


def score(reflector: Reflector, sequences: list[FrameSequence]) -> list[Tensor]:
    """R `[F]` in [0, 1] for every frame of every sequence."""
    device = reflector.proprio_mean.device

    def one(s: FrameSequence) -> Tensor:
        logits = reflector(s.images[None].to(device), s.proprio[None].to(device), [s.instruction])
        return torch.sigmoid(logits[0]).cpu()

    with torch.no_grad():
        return parallel.shared([partial(one, s) for s in sequences])
