"""What holds of the whole house: who imports what, and where the benchmark is known."""

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import worldenv

ROOT = Path(worldenv.__file__).parent
LIBRARIES = ("transformers", "diffusers", "peft")
NEUTRAL = [*sorted((ROOT / "models").glob("*.py")), *sorted((ROOT / "rl").glob("*.py"))]


def test_small_models_import_no_library_of_published_ones():
    """Each costs seconds."""
    code = (
        "import sys, worldenv.cli\n"
        "from worldenv.presets import preset\n"
        "from worldenv.stages import store\n"
        "for kind in ('policy', 'simulator', 'reflector'): store.build(kind, preset('smoke'))\n"
        f"print([m for m in {LIBRARIES} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


WORDS = re.compile(
    r"libero|agentview|eye_in_hand|robosuite|mujoco|panda|osc_pose|bddl|meta-?world|sawyer", re.I
)
PUBLISHED = re.compile(r"RLinf-Wan-LIBERO-[\w*]+")  # folders that are called so
NUMBERS = {
    "action_map.py": "sizes of what is drawn",
    "layers.py": "groups of a norm, pixels of a patch",
    "published_sizes.py": "layers and widths as published",
    "tokenizer.py": "axes of a permutation",
    "vae.py": "pixels at once",
    "wovr.py": "frames that WoVR generates at a time",
    "wovr_reward.py": "a published network's kernels and widths",
}
"""Where a 7 or an 8 is no robot's."""


@pytest.mark.parametrize("path", NEUTRAL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_models_and_rl_know_no_benchmark_and_no_robot(path):
    text = path.read_text()
    assert not WORDS.findall(PUBLISHED.sub("", text))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = [t.line.strip() for t in tokens if t.type == tokenize.NUMBER and t.string in "78"]
    assert bool(lines) == (path.name in NUMBERS), lines
