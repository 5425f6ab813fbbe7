"""What messages advise exists: every `--flag` in the program's own words is one of its scripts'."""

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worldenv import cli
from worldenv.runtime import device
from worldenv.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
# Of pip, git, TensorBoard, huggingface-cli and torchrun; a part of published files' names.
FOREIGN = {"--no-build-isolation", "--no-deps", "--force-reinstall", "--porcelain", "--logdir"}
FOREIGN |= {"--local-dir", "--repo-type", "--latest_"}
FOREIGN |= {"--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-endpoint"}


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Of all scripts, as their help lists them."""
    found: set[str] = set()
    scripts = (cli.train, cli.evaluate, cli.collect, cli.imagine, cli.export, cli.play)
    scripts += (cli.doctor, cli.push)
    for script in scripts:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as out,
        ):
            patch.setenv("COLUMNS", "200")
            patch.setattr(sys, "argv", ["worldenv", "--help"])
            with pytest.raises(SystemExit):
                script()
        found |= set(FLAG.findall(out.getvalue()))
    assert {"--posttrain.lr", "--fixture-seeds", "--episodes", "--drive", "--folder"} <= found
    assert "--port" in found
    return found


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of a Python file; a page's style sheet, whose variables begin alike, is none."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):  # whole, so that a name in it does not part a flag
            parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and "var(--" not in str(node.value):
            yield node.lineno, str(node.value)


def exists(flag: str, flags: set[str]) -> bool:
    """Whether there is such a flag, or one that begins so, where the rest is filled in."""
    flag = flag.rstrip(".-")
    return flag in flags | FOREIGN or (flag.startswith("--env") and flag + ".chunk" in flags)


def test_messages_name_flags_that_exist(flags):
    seen = 0
    for path in sorted((ROOT / "worldenv").rglob("*.py")):
        for line, text in literals(path):
            for flag in FLAG.findall(text):
                seen += 1
                assert exists(flag, flags), f"{path.relative_to(ROOT)}:{line}: {flag}"
    assert seen > 20


def test_the_readme_names_flags_that_exist(flags):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = FLAG.findall(text)
    assert len(named) > 10
    assert [flag for flag in named if not exists(flag, flags)] == []


def test_a_script_without_the_flag_is_told_which_one_has_it():
    """`worldenv-eval` was told to use --device auto, which it lacks."""
    with pytest.raises(UserError, match=r"worldenv-train --device auto.*config\.json"):
        device.pick("cuda:99")
