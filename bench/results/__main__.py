"""Draw the tables and figures of README.md and docs/ anew from `results/`.

    python -m bench.results

A region of a page begins with a line `<!-- results: NAME -->` and ends with one of
`<!-- /results -->`; REGIONS names what may stand between them. Everything else is left as it is.
A run that lost is drawn like any other.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.results import defaults, experiments, figures, kernels, scaling
from worldenv.runtime.errors import UserError, unknown

ROOT = Path(__file__).parents[2]
REGIONS: dict[str, Callable[[Path], str]] = {
    "default": defaults.default,
    "world": defaults.world,
    "times": defaults.times,
    "earlier": defaults.earlier,
    "lost": defaults.lost,
    "suite": defaults.suite,
    "metaworld": partial(defaults.suite, folder="metaworld"),
    "experiments": experiments.experiments,
    "full-size": experiments.full_size,
    "kernels": kernels.kernels,
    "scaling": scaling.scaling,
    "paper": scaling.on_paper,
    "stale": scaling.staleness,
    "kills": scaling.kills,
}
PAGES = ("README.md", "docs/launching.md", "docs/tuning.md")
FIGURES: dict[str, Callable[[Path], str]] = {
    "docs/differences.svg": figures.differences,
    "docs/scaling.svg": scaling.figure,
}
_MARK = re.compile(r"^<!-- (/?)results:? ?(.*?) ?-->$", re.MULTILINE)


def render(text: str, results: Path) -> str:
    """The text with each region drawn from the folder `results`.

    Raises:
        UserError: a region has no known name, or does not end before the next begins.
    """
    marks = list(_MARK.finditer(text))
    opened, closed = marks[::2], marks[1::2]
    if len(marks) % 2 or any(m[1] for m in opened) or not all(m[1] for m in closed):
        raise UserError(
            "expected each `<!-- results: NAME -->` to be followed by its "
            f"`<!-- /results -->`, got {', '.join(m[0] for m in marks)}. Close the open region."
        )
    parts, end = [], 0
    for first, last in zip(opened, closed, strict=True):
        if first[2] not in REGIONS:
            raise unknown("region", first[2], REGIONS)
        parts += [text[end : first.end()], "\n", REGIONS[first[2]](results), "\n"]
        end = last.start()
    return "".join([*parts, text[end:]])


def main() -> int:
    """Draws and writes; the exit status."""
    argparse.ArgumentParser(
        prog="python -m bench.results", description=__doc__.splitlines()[0]
    ).parse_args()
    results = ROOT / "results"
    try:
        drawn = {ROOT / name: draw(results) for name, draw in FIGURES.items()}
        for page in (ROOT / name for name in PAGES):
            drawn[page] = render(page.read_text(encoding="utf-8"), results)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for path, content in drawn.items():
        path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
