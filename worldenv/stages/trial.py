"""The trial of a round's world: fresh real episodes, and what the world makes of them.

    measures/episodes-N/       real episodes of the policy that explored, from placements of their
                               own, with where the goal's things truly were
    measures/policies/*.json   real success of every policy that was ranked
    measures/simulator-N.json  the figures; simulator-N.png, film-N.png: to look at

Nothing here trains what acts, imagines or judges, and no start is an evaluation's or training's.
What was collected is kept: the same command goes on, or measures again.
"""

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from worldenv.data.episode import Episode
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.data.windows import chunk_sequences, from_first_step
from worldenv.envs.start import Start
from worldenv.fields import Items, Range, fingerprint
from worldenv.fields import check as check_fields
from worldenv.models.policy import Policy
from worldenv.ranges import Episodes, FromZero
from worldenv.report import measures as drawing
from worldenv.report.page import write_report
from worldenv.report.statistics import wilson
from worldenv.rl.noise import Noise, exploration
from worldenv.rl.policy import trainable
from worldenv.runtime import device as devices
from worldenv.runtime import parallel, progress
from worldenv.runtime.errors import UserError
from worldenv.runtime.revision import commit
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import collect, measures, pipeline, probe, store, thresholds
from worldenv.stages.evaluate import resumed
from worldenv.stages.posttrain import snapshots
from worldenv.stages.reality import embodiment
from worldenv.stages.run import Run, policy_before, stage_before, world_of, write_json
from worldenv.stages.scene import Things, World, fixed_camera

FEWEST = 6  # values of which no half can all lie on one side of the middle by chance (95%)
POLICIES = 8
Outcomes = tuple[list[bool], list[bool]]  # by start, imagined and real
WEAKER = (0.1, 0.14, 0.07, 0.18)  # noise in deviations of each tensor; 0.2 leaves nothing


@dataclass(frozen=True)
class Trial:
    """What is asked of `worldenv-eval --simulator`."""

    round: FromZero | None = None
    """With --simulator: whose world; default: the last round's."""
    episodes: Episodes = 100
    """With --simulator: fresh episodes per task of the policy that explored."""
    policy_starts: Episodes = 30
    """With --simulator: fresh starts per task on which each policy to rank really acts."""
    policies: Annotated[tuple[Path, ...], Items(least=0)] = ()
    """With --simulator: checkpoints to rank beside the run's own; default: weaker copies."""
    within: Annotated[float, Range(0.01, 0.5)] | None = None
    """With --simulator: refuse fewer episodes than it takes to know any rate to within this."""

    def __post_init__(self) -> None:
        check_fields(self, lambda name: f"--{name.replace('_', '-')}")


def run_trial(run: Run, asked: Trial) -> dict:
    """Collect, measure, write measures/simulator-N.json and draw it; returns what it holds."""
    begun, config = time.perf_counter(), run.config
    n = config.posttrain.rounds - 1 if asked.round is None else asked.round
    check(run, asked, n)
    names = {
        "simulator": world_of(config, n),
        "reflector": f"reflector-{n}",
        "policy": policy_before(n),
    }
    simulator, reflector, explorer = (
        store.load(kind, run.path("checkpoints", f"{name}.safetensors"), run.device, config)
        for kind, name in names.items()
    )
    episodes = held_out(run, explorer, asked.episodes, n)
    real = from_first_step(chunk_sequences(episodes, config.env.chunk))
    world = World(config, run.embodiment, simulator, reflector, real, n)
    measured = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "machine": {**devices.describe(), "threads": parallel.threads()},
        "preset": config.preset,
        "seed": config.seed,
        "suite": config.env.suite,
        "tasks": list(config.env.tasks),
        "round": n,
        "sampling_steps": world.passes,
        "threshold": round(float(reflector.threshold), 4),
        "real_threshold": round(thresholds.of_reality(reflector), 4),
        **world.frames(),
        **about_things(run, world, episodes),
        **_policies(run, world, explorer, episodes, asked),
    }
    measured["seconds"] = round(time.perf_counter() - begun, 1)
    write_json(run.path("measures", f"simulator-{n}.json"), measured)
    drawing.draw(measured, run.path("measures", f"simulator-{n}.png"))
    drawing.film(_shown(world), run.path("measures", f"film-{n}.png"))
    if (run.dir / "results.json").exists():
        write_report(run.dir)
    return measured


def told(measured: dict) -> str:
    """The figures that matter most, a line each."""

    def line(name: str, figure: dict) -> str:
        if figure.get("value") is None:
            return f"{name}: none (n = {figure.get('n', 0)})"
        span = "no interval" if figure["low"] is None else f"{figure['low']} to {figure['high']}"
        return f"{name}: {figure['value']} (95% {span}, n = {figure['n']})"

    event, gaps, order = (measured[k] for k in ("event", "closed_loop", "ranking"))
    gains = {
        f"{where}, {acting}": figure
        for acting, worlds in measured["gain"].items()
        for where, figure in worlds.items()
    }
    return "\n".join(
        [
            *(line(f"{kind}, 1 chunk before, agree", event[kind].get("1", {})) for kind in event),
            *(line(f"imagined - real success, {k}", g["difference"]) for k, g in gaps.items()),
            *(line(f"gain of post-training, {how}", figure) for how, figure in gains.items()),
            *(line(f"ranking, {k}", order[k]) for k in ("pearson", "spearman") if k in order),
        ]
    )


def check(run: Run, asked: Trial, n: int) -> None:
    """UserError where the run has no such world, or the episodes are too few for an interval."""
    pipeline.check_round(run.config, n)
    pipeline.check_made(run, [stage_before(n), world_of(run.config, n), f"reflector-{n}"])
    if asked.episodes < FEWEST or not FEWEST <= asked.policy_starts <= asked.episodes:
        raise UserError(
            f"--episodes {asked.episodes}, --policy-starts {asked.policy_starts}: expected at "
            f"least {FEWEST} of each, the fewest that have a 95% interval, and no more starts than "
            "episodes, whose first frames they begin with. Ask for more episodes."
        )
    widest = wilson(asked.episodes // 2, asked.episodes)
    half = (widest.high - widest.low) / 2
    if asked.within is not None and half > asked.within:
        need = int((1.96 / (2 * asked.within)) ** 2) - 2
        raise UserError(
            f"--within {asked.within}: a rate over {asked.episodes} episodes is known to within "
            f"{half:.3f} at worst. Expected about {need} episodes (--episodes {need}), or a wider "
            "interval."
        )


# ---------------------------------------------------------------- reality


def held_out(run: Run, policy: Policy, count: int, n: int) -> list[Episode]:
    """`count` real episodes per task of the policy that explored, with its noise; those not yet
    in measures/episodes-N are collected. In their `extras`: where the goal's things were."""
    config = run.config
    noise = collect.exploration_noise(config, policy)
    mark = fingerprint(
        *("trial", store.digest(policy), config.seed, n),
        *(collect.world(config), collect.recording(config)),
    )
    starts = [
        Start(task, None, derive(config.seed, "trial", n, task, k) % 2**31)
        for task in config.env.tasks
        for k in range(count)
    ]
    folder = run.path("measures", f"episodes-{n}")
    left = collect.left_to_record(folder, mark, starts, alone=False)
    with DatasetWriter(folder) as writer, progress.bar(len(starts), "held-out episodes") as bar:
        bar.update(len(starts) - len(left))

        def recorder(env: VectorEnv) -> collect.EpisodeRecorder:
            def keep(episode: Episode) -> None:
                seen = env.objects(0)
                if not seen[0]:
                    raise UserError(
                        f"--simulator: expected a benchmark that says where its things are "
                        f"(`objects` of Simulator.observe), got {run.benchmark.name}, which says "
                        "none. Add them, for measuring only."
                    )
                for i, name in enumerate(seen[0]):
                    places = [seen[step][name] for step in episode.frame_steps.tolist()]
                    episode.extras[f"{probe.THINGS}{i}_{name}"] = np.stack(places)
                episode.meta["mark"] = mark
                writer.append(episode)
                bar.advance()

            return collect.EpisodeRecorder(
                config, left, keep, config.collect.hold_chunks * config.env.chunk
            )

        run.reality.roll_out(
            policy.to(run.acting).eval(),
            left,
            recorder,
            seeds=[derive(config.seed, "trial noise", n, s.task, s.seed) for s in left],
            noise=noise,
            terminate="never",
            record_every=config.collect.record_every,
        )
    place = {(s.task, s.seed): k for k, s in enumerate(starts)}
    found = [e for e in read_episodes(folder, config.env.image_size) if e.meta.get("mark") == mark]
    found = [e for e in found if (e.task, e.seed) in place]
    for episode in found:
        episode.images = episode.images[:, : run.embodiment.V]
    return sorted(found, key=lambda e: place[e.task, e.seed])


def weakened(policy: Policy, noise: float, g: torch.Generator) -> Policy:
    """A copy whose trained matrices bear `noise` times the deviation of their own numbers."""
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in trainable(copied).values():
            if weight.ndim > 1:
                drawn = torch.randn(weight.shape, generator=g).to(weight.device)
                weight += noise * weight.std() * drawn
    return copied


def iteration(snapshot: Path) -> int:
    """After which a policy was left."""
    return int(snapshot.stem)


def ranked(run: Run, named: tuple[Path, ...], n: int) -> tuple[dict[str, Policy], dict[str, str]]:
    """The run's own policies up to round n by name, and beside them those named, or weaker copies
    until there are POLICIES; and the names of those that are left out, being another once more (a
    round may keep what it began with), with that other's."""
    config = run.config
    own = ["policy-sft", *(f"policy-{k}" for k in range(n + 1))]
    paths = {name: run.dir / "checkpoints" / f"{name}.safetensors" for name in own}
    files = {name: path for name, path in paths.items() if path.exists()}
    for k in range(n + 1):  # exploited ones among them, if the run left any
        left = sorted(run.dir.joinpath(*snapshots(k)).glob("*.safetensors"), key=iteration)
        files |= {f"policy-{k} after {iteration(path)}": path for path in left}
    files |= {str(path): store.locate("policy", path) for path in named}
    found: dict[str, Policy] = {}
    same: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, path in files.items():
        policy = store.load("policy", path, run.device, config)
        twin = first.setdefault(store.digest(policy), name)
        if twin == name:
            found[name] = policy
        else:
            same[name] = twin
    strong = list(found.items())
    for level in () if named else WEAKER:
        for name, policy in strong[: max(0, POLICIES - len(found))]:
            g = generator(config.seed, "weaker", name, str(level))
            found[f"{name} weakened {level}"] = weakened(policy, level, g)
    return found, same


# ---------------------------------------------------------------- figures


def about_things(run: Run, world: World, episodes: list[Episode]) -> dict:
    """The goal's things, and agreement at the event, over all tasks."""
    errors, near, grasped = {}, {}, {}
    for task in run.config.env.tasks:
        numbers = [k for k, e in enumerate(episodes) if e.task == task]
        own = replace(run.config, env=replace(run.config.env, tasks=(task,)))
        robot = embodiment(own)
        view = fixed_camera(robot)
        if view is None:
            raise UserError(
                f"{run.dir}: expected a camera that does not move, got {', '.join(robot.views)}."
            )
        chosen = [episodes[k] for k in numbers]
        things = Things(world, chosen, numbers, view, robot.cameras[view])
        errors[str(task)] = things.errors()
        near |= dict.fromkeys(numbers, things.carried)
        for lead, rows in things.grasps().items():
            whole = grasped.setdefault(lead, ([], [], []))
            for row, more in zip(whole, rows, strict=True):
                row += more
    grasp = {
        lead: {
            **measures.agreement(said, truth),
            "on_real": measures.agreement(seen, truth),
        }
        for lead, (said, seen, truth) in grasped.items()
    }
    placing = world.placings(near=lambda m: near[m.sequence](m))
    won = [e.success for e in episodes]
    close = [
        near[k](measures.Moment(k, 0, len(s) - 1)) and not won[k] for k, s in enumerate(world.real)
    ]
    return {
        "episodes": {"n": len(won), "successes": sum(won), "carried_failures": sum(close)},
        "things": errors,
        "event": {"grasp": grasp, "placing": placing},
    }


def _policies(
    run: Run, world: World, explorer: Policy, episodes: list[Episode], asked: Trial
) -> dict:
    """Closed loop and ranking: success of policies in both worlds, from the same first frames; and
    what the post-trained one gains in each."""
    noise = collect.exploration_noise(run.config, explorer)
    noisy = world.succeeds(explorer.to(run.device), range(len(episodes)), noise)
    counted: dict[int, int] = {}
    chosen = []
    for k, e in enumerate(episodes):
        counted[e.task] = counted.get(e.task, 0) + 1
        if counted[e.task] <= asked.policy_starts:
            chosen.append(k)
    starts = [Start(episodes[k].task, None, episodes[k].seed) for k in chosen]

    def both(name: str, policy: Policy, how: Noise | None = None) -> Outcomes:
        imagined = world.succeeds(policy.to(run.device), chosen, how)
        return imagined, _really(run, policy, starts, name, how)

    policies, same = ranked(run, asked.policies, world.number)
    outcomes = {name: both(name, policy) for name, policy in policies.items()}
    gaps = {name: measures.gap(*pair) for name, pair in outcomes.items()}
    closed = {"explored_with_noise": measures.gap(noisy, [e.success for e in episodes])}
    names = {"explored": policy_before(world.number), "posttrained": f"policy-{world.number}"}
    own = {k: same.get(name, name) for k, name in names.items()}
    closed |= {k: gaps[name] for k, name in own.items() if name in gaps}
    gains = {}
    if all(name in policies for name in own.values()):
        moves = run.embodiment.actions("translate")
        how = exploration(explorer.distribution, run.config.posttrain, moves)
        gains = {
            "on its mean": _gained([outcomes[name] for name in own.values()]),
            "with noise": _gained(
                [both(f"{name}, with noise", policies[name], how) for name in own.values()]
            ),
        }
    enough = len(gaps) >= 4
    return {
        "closed_loop": closed,
        "gain": gains,
        "ranking": {**(measures.ranking(gaps) if enough else {}), "policies": gaps, "same": same},
    }


def _gained(pair: Sequence[Outcomes]) -> dict:
    """What the second of two policies gains on the first, in both worlds."""
    imagined, real = zip(*pair, strict=True)
    return {"imagined": measures.gained(*imagined), "real": measures.gained(*real)}


def _really(
    run: Run, policy: Policy, starts: list[Start], name: str, noise: Noise | None
) -> list[bool]:
    """Real success by start; kept, by the policy's numbers and the noise."""
    digest = store.digest(policy)
    acting = () if noise is None else (noise,)
    mark = fingerprint("trial", digest, run.config.seed, collect.world(run.config), *acting)
    kept = f"{digest[:16]}{'-noise' if acting else ''}.json"
    path = run.path("measures", "policies", kept)
    done = resumed(run, policy.to(run.acting), starts, name, path, mark, noise=noise)
    won = {(e["task"], e["seed"]): e["success"] for e in done}
    return [won[s.task, s.seed] for s in starts]


def _shown(world: World) -> list[tuple[str, Tensor, Tensor]]:
    """A success and a failure to look at: what it was, frames [F, V, H, W, 3] of both worlds."""
    shown = []
    for won in (True, False):
        k = next((k for k, s in enumerate(world.real) if bool(s.success.any()) == won), None)
        if k is not None:
            name = "success in reality" if won else "failure in reality"
            shown.append((name, world.real[k].images, world.imagined[k].images))
    return shown
