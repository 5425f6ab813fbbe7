"""What a finished run leaves for people: results.json, videos of both worlds and report.html."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from worldenv.fields import fingerprint
from worldenv.report.page import write_report
from worldenv.report.statistics import paired_difference
from worldenv.runtime import device as devices
from worldenv.runtime import parallel
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.revision import commit
from worldenv.stages import collect, evaluate, store
from worldenv.stages.imagine import imagine, real_episodes
from worldenv.stages.run import Run, world_of, write_json


def report(run: Run, names: Sequence[str]) -> Path:
    """Write results.json from what the stages `names` left, then draw it: videos, report.html.

    A finished run is finished: what cannot be drawn is said, on the page and on the terminal.
    Returns the path of results.json.
    """
    path = run.path("results.json")
    write_json(path, collect_results(run, names))
    missing: list[str] = []
    page = ("report.html", lambda r: write_report(r.dir, missing))
    # Videos show two worlds.
    drawings = (("videos", _draw_videos), page) if run.config.learned else (page,)
    for what, draw in drawings:
        try:
            draw(run)
        except (UserError, OSError) as error:
            missing.append(f"{what}: {error}")
            print(f"not drawn: {missing[-1]}", file=sys.stderr)
    if missing:
        print("The results are complete; the same command draws what is missing.", file=sys.stderr)
    return path


def _draw_videos(run: Run) -> None:
    """The videos, unless those in the folder show these very policies."""
    media = run.path("media", "x").parent
    mark = media / f"{fingerprint(run.record('evaluate')['fingerprint'])}.done"
    if not mark.exists():
        shutil.rmtree(media, ignore_errors=True)
        _videos(run, media)
        mark.touch()


def _videos(run: Run, media: Path) -> None:
    """A few held-out episodes before and after post-training, beside their imagination."""
    config = run.config
    last = config.posttrain.rounds - 1
    load = lambda kind, name: store.load(  # noqa: E731
        kind, run.path("checkpoints", f"{name}.safetensors"), run.device
    )
    world, judge = load("simulator", world_of(config, last)), load("reflector", f"reflector-{last}")
    outcomes = run.record("evaluate")["outcomes"]
    starts = evaluate.held_out_starts(run)
    changed = {
        (b["task"], b["start"], b["seed"])
        for b, a in zip(outcomes["sft"], outcomes["posttrained"], strict=True)
        if a["success"] and not b["success"]
    }
    shown = [s for s in starts if (s.task, s.index, s.seed) in changed][:2]
    shown += [s for s in starts if s not in shown][: 2 - len(shown)]
    steps = config.sampling_steps(last)
    for label, name in (("before", "policy-sft"), ("after", f"policy-{last}")):
        episodes = real_episodes(run, load("policy", name).cpu(), shown)
        imagine(run, episodes, world, judge, media, label, steps=steps)
        if label == "after":
            policy = load("policy", name)
            imagine(
                run,
                episodes[:1],
                world,
                judge,
                media,
                "closed-loop",
                drive="policy",
                policy=policy,
                steps=steps,
            )


def collect_results(run: Run, names: Sequence[str]) -> dict:
    """What results.json holds, from the records of the stages `names`, in that order."""
    config = run.config
    last = config.posttrain.rounds - 1
    records = {name: run.record(name) for name in names}
    outcomes, sampled = (records["evaluate"].get(kind) for kind in ("outcomes", "sampled"))
    measured = records.get(f"fidelity-{last}", {})
    skip = {"fingerprint", "artifacts", "outcomes", "sampled", "reflector"}
    costs = {"seconds", "peak_memory_bytes", "peak_gpu_bytes"}
    stages = {
        name: {k: v for k, v in record.items() if k not in skip} for name, record in records.items()
    }
    trained = [records[f"posttrain-{n}"] for n in range(last + 1)]
    seconds = sum(r["imagination_seconds"] for r in trained)
    used = spent_in_reality(records)
    gap = _closed_loop_gap(run, last, trained[-1]["kept_iteration"])
    instructions = {e.task: e.instruction for e in collect.load_round(run, -1)[0]}
    return {
        "preset": config.preset,
        "seed": config.seed,
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "benchmark": run.benchmark.name,
        "suite": config.env.suite,
        "world": config.posttrain.world,
        "real_episodes_used": sum(used.values()),
        "real_episodes": used,
        "tasks": [
            {"id": t, "instruction": instructions.get(t, ""), **successes(outcomes, t)}
            for t in config.env.tasks
        ],
        **successes(outcomes),
        **({"sampled": {**successes(sampled), "evaluation": sampled}} if sampled else {}),
        **(
            {
                "fidelity": {
                    **{k: v for k, v in measured.items() if k not in skip | costs},
                    "closed_loop_gap": gap,
                },
                "reflector": measured["reflector"],
            }
            if measured
            else {}
        ),
        "stages": stages,
        "total_seconds": round(sum(r["seconds"] for r in records.values()), 1),
        "frames_per_second": round(sum(r["frames"] for r in trained) / max(seconds, 1e-9), 1),
        "peak_memory_bytes": max(r.get("peak_memory_bytes", 0) for r in records.values()),
        "machine": {**devices.describe(), "threads": parallel.threads()},
        "evaluation": outcomes,
    }


def spent_in_reality(records: dict[str, dict]) -> dict[str, int]:
    """How many real episodes a run's policy was made with, by purpose; those that measure it
    afterwards are not among them. records: of its stages, by name."""

    def count(kind: str, field: str) -> int:
        return sum(r.get(field, 0) for name, r in records.items() if name.startswith(kind))

    return {
        "demonstrations": count("demonstrations", "episodes"),
        "explored": count("explore-", "episodes"),
        "checks": count("posttrain-", "check_episodes"),
        "rl": count("posttrain-", "rl_episodes"),
    }


def successes(outcomes: dict[str, list[dict]], task: int | None = None) -> dict:
    """`success_of` both policies in one task or all, and as "no_oracle" where a reflector ruled."""
    own = {k: [e for e in rows if task in (None, e["task"])] for k, rows in outcomes.items()}
    ruled = all("success_no_oracle" in e for rows in own.values() for e in rows)
    judged = {"no_oracle": success_of(own, "success_no_oracle")} if ruled else {}
    return {**success_of(own, "success"), **judged}


def success_of(outcomes: dict[str, list[dict]], key: str) -> dict:
    """Counts and the paired difference of outcomes["sft"] and outcomes["posttrained"], episodes in
    the same order; errors clustered by task and start."""
    before, after = (outcomes[label] for label in ("sft", "posttrained"))
    clusters = [(e["task"], e["start"]) for e in before]
    values = [[float(e[key]) for e in rows] for rows in (before, after)]
    summary = {
        label: {"successes": int(sum(v)), "episodes": len(v)}
        for label, v in zip(("sft", "posttrained"), values, strict=True)
    }
    if len(set(clusters)) < 2:
        return {**summary, "paired_difference": None}
    difference = paired_difference(*values, clusters)
    rounded = {k: round(getattr(difference, k), 4) for k in ("mean", "low", "high")}
    return {**summary, "paired_difference": rounded}


def _closed_loop_gap(run: Run, last: int, kept: int | None) -> float | None:
    """Imagined minus real success of the kept policy, None without checks in reality."""
    rows = [r for r in read_metrics(run.dir, f"check-{last}") if r["step"] == kept]
    return round(rows[-1]["imagined"] - rows[-1]["real"], 4) if rows else None
