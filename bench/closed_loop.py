"""What of imagined success is real: policies with and without noise, in both worlds.

    python -m bench.closed_loop RUN... [--episodes 30] [--out FILE]

Of each finished run the policy that explored and the post-trained one act from the same fresh
starts (so many of each task), on their means and with the noise of post-training, in reality and,
from the first real frame, in the world that they were post-trained in. A gain that is there with
noise alone is of a policy that has learned to bear it; one in imagination alone is none. The fresh
episodes are kept in the run's folder, as `worldenv-eval --simulator` keeps them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.__main__ import RESULTS, origin
from worldenv.config import load
from worldenv.data.windows import chunk_sequences, from_first_step
from worldenv.envs.start import Start
from worldenv.report.statistics import paired_difference
from worldenv.rl.noise import exploration
from worldenv.stages import store, trial
from worldenv.stages.evaluate import evaluate_policy
from worldenv.stages.run import Run, policy_before, world_of, write_json
from worldenv.stages.scene import World


def measured(folder: Path, episodes: int) -> dict:
    """By acting, world and policy: successes by start; and the paired differences."""
    run = Run(load(folder / "config.json"))
    try:
        config, last = run.config, run.config.posttrain.rounds - 1
        names = {"explored": policy_before(last), "post-trained": f"policy-{last}"}
        parts = {"simulator": world_of(config, last), "reflector": f"reflector-{last}"}
        simulator, reflector, *policies = (
            store.load(kind, run.path("checkpoints", f"{name}.safetensors"), run.device, config)
            for kind, name in [*parts.items(), *(("policy", name) for name in names.values())]
        )
        fresh = trial.held_out(run, policies[0], episodes, last)
        real = from_first_step(chunk_sequences(fresh, config.env.chunk))
        world = World(config, run.embodiment, simulator, reflector, real, last, imagined=real)
        starts = [Start(e.task, None, e.seed) for e in fresh]
        moves = run.embodiment.actions("translate")
        noise = exploration(policies[0].distribution, config.posttrain, moves)
        found: dict = {"seed": config.seed, "tasks": [s.task for s in starts]}
        for acting, how in (("on its mean", None), ("with noise", noise)):
            imagined, really = {}, {}
            for name, policy in zip(names, policies, strict=True):
                imagined[name] = world.succeeds(policy, range(len(real)), how)
                label = f"{folder.name}, {name}, {acting}"
                outcomes = evaluate_policy(run, policy, starts, label, noise=how)
                of = {(e["task"], e["seed"]): e["success"] for e in outcomes}
                really[name] = [of[s.task, s.seed] for s in starts]
            found[acting] = {"imagined": compared(imagined), "real": compared(really)}
    finally:
        run.close()
    return found


def compared(outcomes: dict[str, Sequence[bool]]) -> dict:
    """Outcomes of both policies, and what the second gains on the first, in points."""
    before, after = ([float(x) for x in each] for each in outcomes.values())
    gain = paired_difference(before, after, range(len(before)))
    points = [round(100 * float(x), 1) for x in (gain.mean, gain.low, gain.high)]
    counts = {f"{name}_successes": sum(each) for name, each in outcomes.items()}
    return {**counts, "points": points, **{k: [*map(int, v)] for k, v in outcomes.items()}}


def main() -> None:
    """Parses the command line, measures every run, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs")
    parser.add_argument("--episodes", type=int, default=30, help="fresh starts of each task")
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "closed-loop/results.json")
    given = parser.parse_args()
    found = {folder.name: measured(folder, given.episodes) for folder in given.runs}
    for name, run in found.items():
        for acting in ("on its mean", "with noise"):
            for world, both in run[acting].items():
                counts = (both[f"{k}_successes"] for k in ("explored", "post-trained"))
                print(name, acting, world, *counts, *both["points"], f"of {len(run['tasks'])}")
    write_json(given.out, {**origin("bench.closed_loop"), "runs": found})


if __name__ == "__main__":
    main()
