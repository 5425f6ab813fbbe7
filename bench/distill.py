"""What distillation reaches on real episodes: one pass a frame of a simulator that takes many.

    python -m bench.distill RUN... [--steps 400] [--warm-up 120] [--self-forcing 120] [--out FILE]

In a folder of --work, each run folder's first simulator is trained anew by its own stage on the
run's episodes, but as one that needs passes: predicting velocities of latents of a small
autoencoder, with a window of two frames. The stage `distill` then distils it. The run folders are
only read; trained simulators stay in --work and are not trained twice.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from bench.__main__ import origin
from worldenv.config import Config, DistillConfig, load
from worldenv.fields import fingerprint, to_dict
from worldenv.runtime.revision import commit
from worldenv.stages import distill, simulator
from worldenv.stages.run import Run, read_record, write_json, write_record

ROOT = Path(__file__).parents[1]
TEACHER = {
    "prediction": "velocity",
    "window": 2,
    "tokenizer": "autoencoder",
    "latent_channels": 64,
    "tokenizer_steps": 400,
}


def configured(run: Path, given: argparse.Namespace) -> Config:
    """The run's configuration, but for simulator, distillation, folder and threads."""
    config = load(run / "config.json")
    folder = given.work / f"{run.name}-{given.steps}"
    return replace(
        config,
        run_dir=folder,
        threads=1,
        simulator=replace(config.simulator, steps=given.steps, **TEACHER),
        distill=DistillConfig(
            steps=given.warm_up,
            self_forcing_steps=given.self_forcing,
            teacher_steps=given.teacher_steps,
        ),
    )


def distilled(run: Path, config: Config) -> dict[str, dict]:
    """Records of the stages simulator and distill on a run's episodes."""
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((run / "data").resolve())
    here, records = Run(config), {}
    try:
        mark = fingerprint(config.seed, config.simulator)
        for stage in (simulator, distill):
            name = f"{stage.STAGE.name}-0"
            mark = mark if stage is simulator else fingerprint(mark, config.distill)
            path = folder / "stages" / f"{name}.json"
            record = read_record(path)
            if record is None or record.get("mark") != mark:
                record = {"mark": mark, **stage.run(here, mark, 0)}
                write_record(path, record)
            records[name] = {k: v for k, v in record.items() if k != "mark"}
    finally:
        here.close()
    return records


def main() -> None:
    """Parses the command line, trains, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs")
    parser.add_argument("--steps", type=int, default=400, help="of the teacher's training")
    parser.add_argument("--warm-up", type=int, default=120, help="steps of the ODE warm-up")
    parser.add_argument("--self-forcing", type=int, default=120, help="steps of self-forcing")
    parser.add_argument("--teacher-steps", type=int, default=8, help="the teacher's passes")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "distill")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "distill" / "results.json")
    given = parser.parse_args()
    code, found = commit(), {}
    for run in given.runs:
        config = configured(run, given)
        found[run.name] = {"seed": config.seed, **distilled(run, config)}
        for arm, reached in found[run.name]["distill-0"]["reached"].items():
            print(f"{run.name} {arm}: {reached}")
    report = {
        **origin("bench.distill", threads=1),
        "commit": code,  # as it was when the first run began
        "config": to_dict(replace(config, run_dir=Path("."))),
        "runs": found,
    }
    write_json(given.out, report)


if __name__ == "__main__":
    main()
