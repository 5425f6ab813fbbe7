"""Short imagined branches that end in a value, against whole imagined episodes.

    python -m bench.branches RUN... [--chunks 1 2 4] [--work DIR] [--out FILE]

The first round of finished runs post-trains once more in its own world, with branches of so many
chunks from any explored state in place of episodes. What a branch is worth is 1 where the judge
sees success, 0 where time has run out, else a value fitted once, before, to the outcomes of the
round's explored episodes and of their imagined replays: from the imitated policy's features and the
time that is left. Leave-one-out over the branches of a context; as many decisions an iteration
whatever their length. The policies after 4 and 8 iterations, the imitated one and the run's own act
in reality on the same fresh placements. The run folders are only read.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from bench.__main__ import origin
from bench.stopping import PLACEMENTS, counted
from worldenv.config import load
from worldenv.data.windows import FrameSequence, chunk_sequences, from_first_step
from worldenv.envs.imagined import first_frames, imagined_envs, middle_frames
from worldenv.envs.start import Start
from worldenv.fields import fingerprint
from worldenv.models.policy import Policy
from worldenv.report.statistics import paired_difference
from worldenv.rl.rollout import Trajectories, join, rollout
from worldenv.rl.update import Learner, update
from worldenv.runtime import parallel
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import measures, store
from worldenv.stages.collect import load_round
from worldenv.stages.evaluate import resumed
from worldenv.stages.posttrain import choose_contexts, new_learner
from worldenv.stages.replay import replay
from worldenv.stages.run import Run, read_record, world_of, write_json, write_record

ROOT = Path(__file__).parents[1]
DECISIONS = 160  # of an iteration, a rollout of each group
ITERATIONS, EVERY = 8, 4
STEPS, BATCH, DROPOUT = 400, 256, 0.3  # of the value's fit


class Value(nn.Module):
    """Chance of success, from a policy's features and the share of the time that is left."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(
            nn.Dropout(DROPOUT), nn.Linear(width + 1, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, features: Tensor, left: Tensor) -> Tensor:
        """Logits `[B]` of features `[B, E]` and left `[B]`."""
        return self.net(torch.cat([self.norm(features.float()), left[:, None]], -1))[:, 0]


@dataclass
class Looked:
    """What a value is fitted to: N frames before success."""

    features: Tensor  # [N, E]
    left: Tensor  # [N]
    won: Tensor  # [N] of their episodes


@torch.no_grad()
def looked_at(policy: Policy, sequences: Sequence[FrameSequence], chunks: int) -> Looked:
    """Frames of episodes as the policy sees them, labelled by how the real ones ended."""

    def one(s: FrameSequence) -> tuple[Tensor, ...]:
        last = int(s.success.float().argmax()) if bool(s.success.any()) else len(s)
        words = [s.instruction] * last
        view = {"image": s.images[:last], "proprio": s.proprio[:last], "instruction": words}
        left = 1 - s.steps[:last].float() / s.actions.shape[1] / chunks
        return policy.both(view)[2].float(), left, torch.full((last,), float(s.success.any()))

    parts = parallel.shared([partial(one, s) for s in sequences])
    return Looked(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fitted(seed: int, shown: Sequence[Looked]) -> Value:
    """Trained on frames drawn evenly from all kinds."""
    torch.manual_seed(derive(seed, "branch value"))
    value = Value(shown[0].features.shape[1]).train()
    optimizer = torch.optim.AdamW(value.parameters(), 1e-3, weight_decay=0.05)
    for step in range(STEPS):
        g = generator(seed, "branch value batch", step)
        losses = []
        for part in shown:
            rows = torch.randint(len(part.won), (BATCH // len(shown),), generator=g)
            logits = value(part.features[rows], part.left[rows])
            losses.append(F.binary_cross_entropy_with_logits(logits, part.won[rows]))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return value.eval()


class World:
    """A round's world, for branches, and what they are worth."""

    def __init__(self, run: Run) -> None:
        config = run.config
        folder = run.dir / "checkpoints"
        simulator = store.load("simulator", folder / f"{world_of(config, 0)}.safetensors")
        reflector = store.load("reflector", folder / "reflector-0.safetensors")
        self.config, self.chunk, self.chunks = config, config.env.chunk, config.max_chunks
        self.imitated = store.load("policy", folder / "policy-sft.safetensors").eval()
        demonstrations, explored, held = load_round(run, 0)
        own, unseen = (from_first_step(chunk_sequences(e, self.chunk)) for e in (explored, held))
        passes = config.sampling_steps(0)
        again = [
            replay(simulator, s, passes, derive(config.seed, "branches", k))
            for k, s in enumerate((own, unseen))
        ]
        kinds = [looked_at(self.imitated, s, self.chunks) for s in (own, again[0])]
        self.value = fitted(config.seed, kinds)
        self.auc = {}
        for name, sequences in (("real", unseen), ("imagined", again[1])):
            seen = looked_at(self.imitated, sequences, self.chunks)
            with torch.no_grad():
                said = self.value(seen.features, seen.left)
            self.auc[name] = measures.auc(said.tolist(), [bool(w) for w in seen.won])
        shown = chunk_sequences(demonstrations, self.chunk)
        sequences = chunk_sequences(explored, self.chunk)
        firsts = [*first_frames(shown), *first_frames(sequences)]
        bank = [*firsts, *middle_frames(sequences, self.chunk)]
        self.bank = [c for c in bank if c.elapsed < self.chunks - 1]
        self.firsts = [*range(len(firsts))]
        self.middles = [*range(len(firsts), len(self.bank))]
        self.envs = imagined_envs(
            simulator.for_generation(),
            reflector,
            self.bank,
            config.posttrain.rows,
            max_chunks=self.chunks,
            sampling_steps=passes,
        )

    @torch.no_grad()
    def branches(self, learner: Learner, length: int, step: int) -> Trajectories:
        """An iteration's, of at most `length` chunks; their final reward is what they are worth."""
        rl, seed, bank = learner.config, self.config.seed, self.bank
        chosen = choose_contexts(
            [c.won for c in bank],
            [c.task for c in bank],
            self.firsts,
            self.middles,
            rl,
            generator(seed, "branch contexts", step),
            step * rl.contexts,
        )
        pairs = [(c, n) for c in range(rl.contexts) for n in range(rl.group)]
        starts = [Start(0, chosen[c], derive(seed, "branch world", step, c)) for c, _ in pairs]
        seeds = [derive(seed, "branch action", step, c, n) for c, n in pairs]
        ends: dict[int, tuple[Tensor, Tensor]] = {}

        def piece(env: VectorEnv, share: slice) -> Trajectories:
            def over(after: dict, info: dict, live: np.ndarray) -> np.ndarray:
                return info["steps"] >= length * self.chunk

            def keep(rows: np.ndarray, before, action, after, info: dict) -> None:
                for row in np.flatnonzero((rows >= 0) & over(after, info, rows)):
                    end = after["image"][row].clone(), after["proprio"][row].clone()
                    ends[share.start + int(rows[row])] = end

            return rollout(
                env,
                learner.policy,
                starts[share],
                seeds=seeds[share],
                noise=learner.noise,
                stop=over,
                on_step=keep,
            )

        shares = parallel.shares(len(starts), len(self.envs))
        pieces = [partial(piece, *pair) for pair in zip(self.envs, shares, strict=False)]
        found = join(parallel.shared(pieces))
        elapsed = torch.tensor([bank[s.index].elapsed for s in starts]) + found.length
        unfinished = (~found.terminated & (elapsed < self.chunks)).nonzero()[:, 0].tolist()
        worth = found.terminated.float()
        if unfinished:
            words = [found.instruction[m] for m in unfinished]
            image, proprio = (torch.stack([ends[m][k] for m in unfinished]) for k in (0, 1))
            view = {"image": image, "proprio": proprio, "instruction": words}
            left = 1 - elapsed[unfinished].float() / self.chunks
            logits = self.value(self.imitated.both(view)[2].float(), left)
            worth[unfinished] = torch.sigmoid(logits)
        return replace(found, final_reward=worth)


def trained(source: Path, work: Path, length: int, world: World | None) -> tuple[World | None, Run]:
    """Policies after every EVERY iterations, in a folder of their own."""
    config = load(source / "config.json")
    rl = replace(
        config.posttrain,
        advantage="loop",
        reward="continuous",
        contexts=DECISIONS // length,
    )
    folder = work / source.name / f"chunks-{length}"
    run = Run(replace(config, run_dir=folder, threads=0, posttrain=rl))
    if read_record(run.dir / "stages" / "train.json") is not None:
        return world, run
    if world is None:
        whole = Run(replace(config, threads=0), writes=False)
        world = World(whole)
        whole.close()
    policy = store.load("policy", source / "checkpoints" / "policy-sft.safetensors")
    learner = new_learner(run, policy, 0)
    logged = []
    for step in range(ITERATIONS):
        episodes = world.branches(learner, length, step)
        metrics = update(learner, episodes, derive(config.seed, "branch update"), step)
        logged.append({k: round(v, 4) for k, v in metrics.items()})
        print(source.name, length, step + 1, f"worth {metrics['reward']:.3f}", flush=True)
        if (step + 1) % EVERY == 0:
            store.save("policy", policy, run.path("checkpoints", f"{step + 1}.safetensors"))
    write_record(run.path("stages", "train.json"), {"auc": world.auc, "iterations": logged})
    return world, run


def played(run: Run, path: Path, label: str) -> list[dict]:
    """Real outcomes of a policy on the fresh placements, those of bench.stopping."""
    policy = store.load("policy", path)
    task, seed = run.config.env.tasks[0], run.config.seed
    starts = [Start(task, None, derive(seed, "stopping", k) % 2**31) for k in range(PLACEMENTS)]
    mark = fingerprint("branches", store.digest(policy), seed)
    return resumed(run, policy, starts, label, run.path("stages", f"{label}.json"), mark)


def measured(source: Path, work: Path, lengths: Sequence[int]) -> dict:
    """Everything of a seed."""
    found: dict[str, dict] = {"trained": {}, "policies": {}}
    outcomes: dict[str, list[dict]] = {}
    world = None
    for length in lengths:
        world, run = trained(source, work, length, world)
        try:
            record = read_record(run.dir / "stages" / "train.json")
            if not outcomes:
                for name, file in (("imitation", "policy-sft"), ("whole after 8", "policy-0")):
                    path = source / "checkpoints" / f"{file}.safetensors"
                    outcomes[name] = played(run, path, name)
            for k in range(EVERY, ITERATIONS + 1, EVERY):
                name = f"{length} after {k}"
                outcomes[name] = played(run, run.dir / "checkpoints" / f"{k}.safetensors", name)
            found["trained"][str(length)] = record
        finally:
            run.close()
    before = [float(e["success"]) for e in outcomes["imitation"]]
    for name, episodes in outcomes.items():
        now = [float(e["success"]) for e in episodes]
        gain = paired_difference(before, now, range(len(before)))
        points = [round(100 * float(x), 1) for x in (gain.mean, gain.low, gain.high)]
        print(source.name, name, int(sum(now)), points, flush=True)
        own = {"points": points, "outcomes": [*map(int, now)]}
        found["policies"][name] = {**counted(episodes), **own}
    return found


def main() -> None:
    """Parses the command line, measures every run, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs of different seeds")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "branches")
    parser.add_argument("--out", type=Path, default=ROOT / "results/branches/results.json")
    given = parser.parse_args()
    seeds = {
        str(load(source / "config.json").seed): measured(source, given.work, given.chunks)
        for source in given.runs
    }
    write_json(given.out, {**origin("bench.branches"), "seeds": seeds})


if __name__ == "__main__":
    main()
