"""The pages on adding things say what is true: their examples run, and they have one shape."""

import pkgutil
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ["an-op", "a-policy", "a-simulator", "a-judge", "a-benchmark"]
# Pages whose example uses another page's.
FIRST = {"a-policy": "a-benchmark", "a-simulator": "a-judge"}
SHAPE = ["The protocol", "An example", "What needs no registration", "Tests"]


def page(name: str) -> str:
    return (DOCS / f"adding-{name}.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name):
    space = {"__name__": "example"}
    for part in (FIRST.get(name), name):
        if part:
            exec(compile(example(part), f"docs/adding-{part}.md", "exec"), space)
    assert example(name).count("assert ") >= 2


@pytest.mark.parametrize("name", NAMES)
def test_pages_have_one_shape_and_fit_on_one(name):
    assert re.findall(r"^## (.*)$", page(name), re.MULTILINE) == SHAPE
    assert len(page(name).splitlines()) <= 100
    assert max(map(len, page(name).splitlines())) <= 110


@pytest.mark.parametrize("name", NAMES)
def test_what_pages_name_exists(name):
    root = DOCS.parent
    paths = re.findall(r"`((?:worldenv|tests|bench|csrc|kernels|stages)/[\w/.]+\w)`", page(name))
    assert paths
    for path in paths:
        place = root / ("worldenv/" + path if path.startswith("stages") else path)
        assert place.exists(), path
    for thing in re.findall(r"`(worldenv\.[\w.]+)", page(name)):
        assert pkgutil.resolve_name(thing) is not None
    links = re.findall(r"\]\(([\w-]+\.md)\)", page(name))
    assert all((DOCS / link).exists() for link in links)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_pages_are_linked(file):
    text = (DOCS.parent / file).read_text(encoding="utf-8")
    assert [name for name in NAMES if f"docs/adding-{name}.md" not in text] == []
