"""How much of imitation's success is luck of its training, and what makes it less.

    python -m bench.imitation train SEED... [--ways NAME...] [--work DIR]
    python -m bench.imitation play SEED... [--ways NAME...] [--work DIR] [--out FILE]

Imitates the default's demonstrations of each seed in each way, and plays the policies in reality on
the same 100 fresh placements. Training leaves two policies: of the last weights, and of their
exponential moving average (Block et al., "Butterfly effects of SGD noise", arXiv 2310.11428: in
imitation, noise of the last steps is amplified by acting, and an average takes it away).
"""

import argparse
import math
from pathlib import Path
from statistics import mean, stdev

from bench.__main__ import origin
from bench.stopping import counted
from worldenv.config import Config
from worldenv.envs.start import Start
from worldenv.fields import fingerprint
from worldenv.models.policy import Policy
from worldenv.runtime import checkpoint
from worldenv.runtime.seeds import derive
from worldenv.stages import pipeline, sft, store, training
from worldenv.stages.evaluate import resumed
from worldenv.stages.run import Run, read_record, write_json, write_record

ROOT = Path(__file__).parents[1]
PLACEMENTS = 100
POLICIES = ("last", "average")


def constant(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up, then no decay."""
    return peak * min(1.0, (step + 1) / (warmup * steps))


WAYS = {"cosine": training.learning_rate, "constant": constant}
"""Learning rates that a policy is trained by."""


def opened(seed: int, way: str, work: Path) -> Run:
    """The folder of a seed and a way, with its demonstrations."""
    run = Run(Config(seed=seed, run_dir=work / f"seed-{seed}" / way, threads=1))
    pipeline.run_stage(run, "demonstrations")
    return run


def train(seed: int, way: str, work: Path) -> None:
    """Write both policies of a way."""
    run = opened(seed, way, work)
    mark = fingerprint("imitation", seed, way, run.config.sft)
    record = run.path("stages", "imitated.json")
    try:
        if (read_record(record) or {}).get("mark") == mark:
            return
        policy, figures = sft.imitate(run, mark, ema=True, schedule=WAYS[way])
        store.save("policy", policy, run.path("checkpoints", "average.safetensors"))
        partial = run.path("checkpoints", "sft.partial.safetensors")
        tensors, _ = checkpoint.load(partial)
        policy.load_state_dict(checkpoint.selected("model/", tensors))
        store.save("policy", policy, run.path("checkpoints", "last.safetensors"))
        training.finish(run, "sft")
        write_record(record, {"mark": mark, **figures})
        print(f"seed {seed}, {way}: {figures}", flush=True)
    finally:
        run.close()


def play(seed: int, way: str, work: Path) -> dict[str, list[dict]]:
    """Real outcomes of both policies; the placements are those of every seed."""
    run = opened(seed, way, work)
    task = run.config.env.tasks[0]
    starts = [Start(task, None, derive("imitation", k) % 2**31) for k in range(PLACEMENTS)]
    played = {}
    try:
        for name in POLICIES:
            policy: Policy = store.load("policy", run.dir / "checkpoints" / f"{name}.safetensors")
            mark = fingerprint("imitation", store.digest(policy))
            path = run.path("stages", f"played-{name}.json")
            label = f"seed {seed}, {way}, {name}"
            played[name] = resumed(run, policy, starts, label, path, mark)
            print(label, sum(e["success"] for e in played[name]), flush=True)
    finally:
        run.close()
    return played


def spread(rates: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds, and what of the latter playing 100 episodes makes."""
    middle = mean(rates)
    return {
        "mean": round(middle, 4),
        "deviation": round(stdev(rates), 4),
        "of_playing": round(math.sqrt(middle * (1 - middle) / PLACEMENTS), 4),
        "lowest": min(rates),
        "highest": max(rates),
    }


def written(seeds: list[int], ways: list[str], work: Path, out: Path) -> None:
    """Plays what is left, and writes everything."""
    found = {}
    for way in ways:
        played = {seed: play(seed, way, work) for seed in seeds}
        for name in POLICIES:
            each = {str(seed): counted(both[name]) for seed, both in played.items()}
            rates = [c["successes"] / c["episodes"] for c in each.values()]
            found[f"{way}, {name}"] = {
                **(spread(rates) if len(rates) > 1 else {}),
                "seeds": each,
                "episodes": {
                    str(s): [e["success"] for e in both[name]] for s, both in played.items()
                },
            }
    write_json(out, {**origin("bench.imitation", threads=1), "ways": found})


def main() -> None:
    """Parses the command line and does what it asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "play"))
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["cosine"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "imitation")
    parser.add_argument("--out", type=Path, default=ROOT / "results/imitation/results.json")
    given = parser.parse_args()
    if given.what == "play":
        written(given.seeds, given.ways, given.work, given.out)
        return
    for way in given.ways:
        for seed in given.seeds:
            train(seed, way, given.work)


if __name__ == "__main__":
    main()
