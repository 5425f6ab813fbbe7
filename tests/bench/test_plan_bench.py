"""A run takes at its peak what was planned for it, within 15 %: the process, its libraries and the
benchmark's processes included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    *("--preset", "smoke", "--posttrain.rounds", "1", "--env.max-steps", "32", "--device", "cpu"),
    *("--collect.demonstrations", "1", "--collect.episodes", "3", "--collect.held-out", "0.34"),
    *("--evaluate.starts", "20", "21"),
]
TRAIN = "from worldenv.entry import train; train()"
COMPARE = """
import json, sys
from pathlib import Path
from bench.plan import compared
print(json.dumps(compared(Path(sys.argv[1]))))
"""


def in_a_fresh_process(code: str, *words: str) -> str:
    command = [sys.executable, "-c", code, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.libero
def test_a_run_takes_what_was_planned_for_it(tmp_path):
    run_dir = str(tmp_path / "run")
    in_a_fresh_process(TRAIN, *TINY, "--run-dir", run_dir)
    stages = json.loads(in_a_fresh_process(COMPARE, run_dir).splitlines()[-1])
    assert stages.keys() == {"sft", "simulator", "reflector", "posttrain"}
    for name, sizes in stages.items():
        assert sizes["ratio"] == pytest.approx(1, rel=0.15), (name, sizes)
