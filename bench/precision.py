"""What imagining in bf16 changes in the worlds of finished runs.

    python -m bench.precision runs/seed-0 runs/seed-1

Replays the held-out episodes of each run's first round in both precisions, with the same noise, and
prints and writes (results/default/precision.json) how far both are from reality, whether the
reflector says the same of both, and frames per second.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

from bench.__main__ import origin
from worldenv.config import load
from worldenv.data.windows import chunk_sequences, from_first_step
from worldenv.models.reflector import Reflector
from worldenv.models.simulator import Simulator
from worldenv.runtime.seeds import derive
from worldenv.stages import store
from worldenv.stages.collect import load_round
from worldenv.stages.fidelity import horizon_errors, outcome_agreement
from worldenv.stages.reflector import score
from worldenv.stages.replay import replay
from worldenv.stages.run import Run, write_json

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float32", "bfloat16")


def measure(folder: Path) -> dict:
    """Both precisions in the first world of a run."""
    run = Run(replace(load(folder / "config.json"), run_dir=folder))
    checkpoints = folder / "checkpoints"
    simulator: Simulator = store.load("simulator", checkpoints / "simulator-0.safetensors")
    reflector: Reflector = store.load("reflector", checkpoints / "reflector-0.safetensors")
    real = from_first_step(chunk_sequences(load_round(run, 0)[2], run.config.env.chunk))
    frames = sum(len(r) - 1 for r in real)
    row: dict = {"run": folder.name, "episodes": len(real), "frames": frames}
    verdicts = []
    for precision in PRECISIONS:
        simulator.config = replace(simulator.config, precision=precision)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            noise = derive(run.config.seed, "precision")
            imagined = replay(simulator, real, run.config.sampling_steps(0), noise)
            seconds.append(time.perf_counter() - began)
        top = [float(s.max()) for s in score(reflector, imagined)]
        verdicts.append([x > float(reflector.threshold) for x in top])
        row[precision] = {
            **horizon_errors(real, imagined),
            **outcome_agreement(reflector, real, imagined),
            "frames_per_second": round(frames / min(seconds), 1),
        }
    row["same_verdict"] = sum(a == b for a, b in zip(*verdicts, strict=True))
    run.close()
    return row


def main() -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "results/default/precision.json")
    arguments = parser.parse_args()
    rows = [measure(folder) for folder in arguments.runs]
    for row in rows:
        print(f"{row['run']}: same verdict on {row['same_verdict']} of {row['episodes']} episodes")
        for precision in PRECISIONS:
            part = row[precision]
            psnr, error = part["psnr_per_horizon"], part["eef_error_cm_per_horizon"]
            print(
                f"  {precision}: {psnr['1']:.2f} / {psnr['8']:.2f} dB, end effector {error['1']} / "
                f"{error['8']} cm (1 / 8 chunks ahead), outcome AUC {part['outcome_auc']}, "
                f"{part['frames_per_second']} frames/s"
            )
    report = {
        **origin("bench.precision"),
        "runs": rows,
    }
    write_json(arguments.out, report)


if __name__ == "__main__":
    main()
