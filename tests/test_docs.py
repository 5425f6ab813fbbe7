"""The pages on adding things say what is true: their examples run, and they have one shape."""

import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from worldenv.cli import TrainArguments
from worldenv.presets import preset
from worldenv.words import parse

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


def commands() -> list[str]:
    """Command lines of docs/launching.md, the YAML's as YAML reads it."""
    text = (DOCS / "launching.md").read_text(encoding="utf-8")
    (manifest,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    service, job = yaml.safe_load_all(manifest)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    stated = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(stated["WORLD_SIZE"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert stated["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).splitlines()
    return [line for line in lines if "worldenv --" in line or "train" in line] + [
        container["command"][-1]
    ]


def test_the_launching_page_has_commands_that_parse(monkeypatch):
    found = commands()
    assert len(found) == 5
    for line in found:
        given = re.search(r"(?:worldenv-train|-m worldenv) (--.*?)'?$", line.strip())[1].split()
        monkeypatch.setattr("sys.argv", ["worldenv-train", *given])
        arguments = parse(TrainArguments, TrainArguments(config=preset("default")))
        assert "runs" in str(arguments.config.run_dir)
        if "torchrun" in line:
            options = line.removeprefix("torchrun ").split(" -m ")[0].split()
            asked = get_args_parser().parse_args([*options, "script"])
            ranks = int(asked.nnodes.split(":")[0]) * int(asked.nproc_per_node)
            assert ranks <= arguments.config.shards
