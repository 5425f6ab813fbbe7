"""What a finished run took at its peak, stage by stage, beside what is planned for it.

    python -m bench.plan RUN_DIR

Printed as JSON, and written to results/bench/plan-<preset>-<machine>.json. Planned in this process,
which is fresh as the run's was; measured by the run itself (`stages/*.json`), on a CPU with the
real benchmark's processes. On another machine than the run's the two mean nothing together.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.__main__ import RESULTS, machine_file, origin
from worldenv.config import load
from worldenv.runtime.errors import UserError
from worldenv.stages import pipeline
from worldenv.stages.plan import plan
from worldenv.stages.run import read_record, write_json


def compared(folder: Path) -> dict[str, dict[str, float]]:
    """By stage: bytes planned and measured, the highest of all rounds, and their ratio."""
    config = load(folder / "config.json")
    found = plan(config)
    kind = "peak_memory_bytes" if found.machine.cpu else "peak_gpu_bytes"
    measured: dict[str, int] = {}
    for name, step in pipeline.steps(config).items():
        record = read_record(folder / "stages" / f"{name}.json") or {}
        stage = step.stage.name
        measured[stage] = max(measured.get(stage, 0), record.get(kind, 0))
    missing = [stage for stage in found.stages if not measured[stage]]
    if missing:
        raise UserError(
            f"{folder}: expected finished stages with {kind}, got none of {', '.join(missing)}. "
            "Finish the run with worldenv-train, all in this version."
        )
    return {
        stage: {
            "planned": moment.bytes,
            "measured": measured[stage],
            "ratio": moment.bytes / measured[stage],
        }
        for stage, moment in found.stages.items()
    }


def main() -> int:
    """Parses the command line, compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="of a finished run")
    folder = parser.parse_args().run_dir
    try:
        stages = compared(folder)
    except UserError as error:
        parser.error(str(error))
    preset, report = load(folder / "config.json").preset, {**origin("bench.plan"), "stages": stages}
    print(json.dumps(report, indent=2))
    write_json(RESULTS / f"plan-{preset}-{machine_file()}", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
