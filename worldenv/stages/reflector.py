"""Train the reflector on real frames and on imagined replays of them (World-Env section 3.4).

The replays (the simulator driven by an episode's real actions) carry the real labels, so that the
reflector learns to judge the frames it will be shown in post-training. Then its threshold eta is
calibrated: simulators differ in how readily they imagine success, and the real outcomes of the
explored episodes say how often it should be found.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from worldenv.data.episode import Episode
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.envs.imagined import first_frames, imagined_envs
from worldenv.envs.start import Start
from worldenv.models.layers import views_to_channels
from worldenv.models.policy import Policy, augment
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.rl.rollout import rollout_shards
from worldenv.runtime import parallel
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import store, training
from worldenv.stages.collect import exploration_noise, load_round
from worldenv.stages.features import DROPOUT, LATE_START, Features
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
    reflector = training.begin(run, "reflector", number, [*demonstrations, *explored])
    learned = {}
    if any(p.requires_grad for p in reflector.parameters()):  # of a prompted one nothing is trained
        learned = _learn(run, mark, number, reflector, simulator_path, demonstrations, explored)
    if part.calibrate and explored:
        simulator = store.load("simulator", simulator_path, run.device)
        policy = store.load("policy", policy_path, run.device)
        reflector.threshold.fill_(_calibrated(run, number, policy, simulator, reflector))
    name = f"reflector-{number}"
    store.save("reflector", reflector, run.path("checkpoints", f"{name}.safetensors"))
    training.finish(run, name)
    return {**learned, "threshold": round(float(reflector.threshold), 4)}


def _learn(
    run: Run,
    mark: str,
    number: int,
    reflector: Reflector,
    simulator_path: Path,
    demonstrations: list[Episode],
    explored: list[Episode],
) -> dict:
    """Train on all frames so far, real and replayed; what of it is recorded."""
    config, part = run.config, run.config.reflector
    own = chunk_sequences(explored, config.env.chunk)
    sequences = [*chunk_sequences(demonstrations, config.env.chunk), *own]
    simulator: Simulator = store.load("simulator", simulator_path, run.device)
    passes = config.sampling_steps(number)
    seed = derive(config.seed, "reflector replay", number)
    imagined = replay(simulator, from_first_step(own), passes, seed)
    del simulator
    shown = [*sequences, *imagined]
    data = padded(shown, run.device)
    frames = Features(run, reflector, shown, data) if reflector.frozen else _Pictures(data)
    sampler, size = _BalancedFrames(data), training.shard_size(run, part.batch)

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
    return {
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
        *store.digests(config.reflector),
    ),
    needs=lambda config, n: (
        *data_up_to(n),
        stage_before(n),
        world_of(config, n),
        *((f"reflector-{n - 1}",) if n else ()),
    ),
    makes=("checkpoints/reflector-{n}.safetensors",),
)

CALIBRATION_EPISODES = 2  # imagined from every explored start


def _calibrated(
    run: Run, number: int, policy: Policy, simulator: Simulator, reflector: Reflector
) -> float:
    """The eta at which the policy that explored succeeds in imagination, from the same first frames
    and with the same noise, as often as it did in reality."""
    config = run.config
    _, earlier, _ = load_round(run, number - 1)
    explored = load_round(run, number)[1][len(earlier) :]
    contexts = first_frames(chunk_sequences(explored, config.env.chunk))
    envs = imagined_envs(
        simulator.for_generation(),
        reflector,
        contexts,
        config.posttrain.rows,
        max_chunks=config.max_chunks,
        sampling_steps=config.sampling_steps(number),
        terminate=False,
    )
    keys = [(c, n) for c in range(len(contexts)) for n in range(CALIBRATION_EPISODES)]
    starts = [Start(0, c, derive(config.seed, "calibration", number, c, n)) for c, n in keys]
    seeds = [derive(config.seed, "calibration action", number, c, n) for c, n in keys]
    noise = exploration_noise(config, policy)
    imagined = rollout_shards(envs, policy.eval(), starts, seeds=seeds, noise=noise, images=False)
    top = torch.zeros(len(starts), device=imagined.reward.device)
    top.scatter_reduce_(0, imagined.episode, imagined.reward, "amax")
    rate = sum(e.success for e in explored) / len(explored)
    return threshold_at(top, rate)


def threshold_at(top: Tensor, rate: float) -> float:
    """The threshold that a share `rate` of the highest rewards `[M]` exceed, within [0.5, 0.99].

    A world harsher than reality is not made up for by believing what is likelier no success.
    """
    return float(torch.quantile(top, 1 - rate).clamp(0.5, 0.99))


NEAR = 4  # frames before success, or before a failure's end, that are nearly one


class _BalancedFrames:
    """Draws frames, each with a first frame of its episode: a third successes, a third near misses
    (what a reflector must not mistake for success is rare among all frames), a third any failures.
    """

    def __init__(self, data: dict) -> None:
        self.data = data
        success, valid = data["success"], data["valid"]
        length = valid.sum(1)
        first = torch.where(success.any(1), success.float().argmax(1), length)[:, None]
        frame = torch.arange(valid.shape[1], device=valid.device)
        near = (frame < first) & (frame >= first - NEAR) & valid & ~success
        self.pools = [x.nonzero() for x in (success & valid, near, valid & ~success)]

    def draw(self, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(episode [B], frame [B], label [B])."""
        pools = [(pool, float(i == 0)) for i, pool in enumerate(self.pools) if len(pool)]
        picks, labels = [], []
        for i, (pool, label) in enumerate(pools):
            n = batch * (i + 1) // len(pools) - batch * i // len(pools)
            picks.append(pool[torch.randint(len(pool), (n,), generator=g)])
            labels.append(torch.full((n,), label))
        chosen = torch.cat(picks)
        return chosen[:, 0], chosen[:, 1], torch.cat(labels).to(chosen.device)


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


def score(reflector: Reflector, sequences: list[FrameSequence]) -> list[Tensor]:
    """R `[F]` in [0, 1] for every frame of every sequence."""
    device = reflector.proprio_mean.device

    def one(s: FrameSequence) -> Tensor:
        logits = reflector(s.images[None].to(device), s.proprio[None].to(device), [s.instruction])
        return torch.sigmoid(logits[0]).cpu()

    with torch.no_grad():
        return parallel.run([partial(one, s) for s in sequences])
