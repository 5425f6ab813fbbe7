"""Benchmarks from elsewhere: found, held to what they say of themselves, and refused in words."""

import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from worldenv.config import Config, load
from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.data.reading import look_into
from worldenv.envs.benchmark import BUILT_IN, GROUP, begun, check, check_spaces, find
from worldenv.envs.start import Start
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.stages import collect, reality, store
from worldenv.stages.run import Run, write_json

ROOT = Path(__file__).parents[2]
OWN = str(ROOT / "examples" / "own_benchmark.py")


@pytest.fixture
def own(tmp_path) -> Config:
    base = preset("smoke")
    return replace(base, env=begun(base.env, OWN), run_dir=tmp_path / "run", device="cpu")


def refused(act, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        act()
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def module(tmp_path):
    """Writes a module of a name that no test has used."""

    def write(text: str) -> str:
        path = tmp_path / f"stranger_{abs(hash(text))}.py"
        path.write_text(text)
        return str(path)

    path, names = list(sys.path), set(sys.modules)
    yield write
    sys.path[:] = path
    for name in {*sys.modules} - names:
        if name.startswith("stranger_"):
            del sys.modules[name]


def test_a_name_a_module_and_a_file_are_found(monkeypatch):
    assert find("libero").name == "libero"
    monkeypatch.syspath_prepend(str(ROOT))
    assert find("examples.own_benchmark:benchmark").name == find(OWN).name == "rails"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == BUILT_IN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_package_at_all", ("ModuleNotFoundError", "at_all", "line 1")),
        ("x = 1\nbenchmark = 1 / 0", ("ZeroDivisionError", "line 2")),
        ("def broken(:", ("SyntaxError",)),
        ("raise SystemExit(3)", ("SystemExit",)),
        ("benchmarks = 3", ("expected a name", "'benchmark'", "Did you mean 'benchmarks'")),
        ("benchmark = 3", ("int without name, suites, embodiment, make",)),
        (
            "from worldenv.envs.benchmark import Benchmark\nclass B(Benchmark): name = 'b'\n"
            "benchmark = B()",
            ("TypeError", "embodiment"),
        ),
        (
            "from worldenv.envs.benchmark import Benchmark\nclass B(Benchmark):\n"
            "    def embodiment(self, env): pass\nbenchmark = B()",
            ("B without name, suites", "docs/adding-a-benchmark.md"),
        ),
        ("class benchmark: pass", ("the class benchmark", "an instance")),
    ],
)  # fmt: skip
def test_what_is_no_benchmark_is_named(module, text, words):
    spec = module(text)
    refused(lambda: find(spec), f"env.benchmark {spec!r}", *words)


def test_what_is_not_there_is_named(tmp_path):
    refused(lambda: find("libro"), "Did you mean 'libero'", "--env.benchmark module:name")
    refused(lambda: find(str(tmp_path / "none.py")), "no such file")
    refused(lambda: find("no_such_package.arm:benchmark"), "no such module")
    refused(lambda: find("worldenv.envs.libero.benchmark:libero"), "Did you mean 'Libero'")
    refused(lambda: find(":benchmark"), "no module")
    (tmp_path / "json.py").write_text("")
    refused(lambda: find(str(tmp_path / "json.py")), "another of this name")


def test_a_configuration_is_held_to_what_the_benchmark_has(own):
    def asking(part="env", **changes):
        config = replace(own, **{part: replace(getattr(own, part), **changes)})
        return lambda: check(config)

    assert asking()().name == "rails"
    assert (own.env.suite, own.env.tasks, own.env.views) == ("blocks", (0,), 1)
    refused(asking(suite="block"), "env.suite", "rails suite", "Did you mean 'blocks'")
    refused(asking(tasks=(0, 2)), "env.tasks", "from 0 to 1", "got 2")
    refused(asking(views=2), "env.views", "expected 1", "got 2")
    refused(asking("evaluate", starts=(40, 51)), "evaluate.starts", "at most 50", "got 51")
    refused(asking("collect", demonstrations=51), "collect.demonstrations", "at most 50")
    base = Config()
    for tasks, words in (((10,), "from 0 to 9"), ((3, 77), "got 77")):
        wrong = replace(base, env=replace(base.env, tasks=tasks))
        refused(lambda c=wrong: check(c), "env.tasks", words)
    wrong = replace(base, env=replace(base.env, suite="libero_spatal"))
    refused(lambda: Run(wrong), "env.suite", "Did you mean 'libero_spatial'")


def test_an_older_config_is_libero_s(tmp_path):
    config = preset("smoke")
    stored = {"env": {"suite": "libero_goal", "tasks": [7]}}
    write_json(tmp_path / "config.json", stored)
    read = load(tmp_path / "config.json")
    assert (read.env.benchmark, read.env.suite) == ("libero", "libero_goal")
    # What was recorded before benchmarks had names stays valid.
    assert collect.world(config) == ("libero_spatial", [8], 64, 8, 48, 2)


def test_what_a_simulator_shows_must_be_what_the_embodiment_says(own, monkeypatch):
    found = find(OWN)
    true = found.simulator.observe
    start = {"starts": [Start(0, 0, 0)]}
    for name, wrong in (
        ("image", lambda seen: seen["image"][:, :-1]),
        ("image", lambda seen: seen["image"] / 255),
        ("proprio", lambda seen: seen["proprio"][:2]),
        ("proprio", lambda seen: seen["proprio"].astype(np.float64)),
    ):

        def observe(self, name=name, wrong=wrong):
            seen = true(self)
            return {**seen, name: wrong(seen)}

        monkeypatch.setattr(found.simulator, "observe", observe)
        env = reality.make_env(own)
        refused(lambda e=env: e.reset(options=start), f"rails: {name}", "hand on rails")
    monkeypatch.setattr(found.simulator, "observe", true)
    env = reality.make_env(own)
    env.reset(options=start)
    refused(lambda: env.step(np.zeros((1, 8, 7))), "[1, 8, 3]", "got [1, 8, 7]")
    refused(lambda: env.reset(options={"starts": [Start(5, 0, 0)]}), "task 5", "tasks 0 to 1")
    wider = replace(found.embodiment(own.env), action=("translate",) * 7)
    refused(lambda: check_spaces(env, wider, "rails"), "action space", "[8, 7]", "got [8, 3]")
    refused(lambda: check_spaces(object(), wider, "rails"), "image space", "got none")


def test_rows_in_processes_see_what_rows_here_see(own, monkeypatch):
    """The simulator of a file, in workers that find it too; a lost one is redone."""
    starts = {"starts": [Start(0, 3, 0), Start(1, None, 7)]}
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 2, 8, 3)).astype(np.float32)
    seen = []
    for processes in (False, True):
        monkeypatch.setattr(type(find(OWN)), "processes", processes)
        env = reality.make_env(own, 2)
        env.record_every = 4
        first, _ = env.reset(options=starts)
        views = [first, *(env.step(chunk) for chunk in actions)]
        (episode,) = env.demonstrate([Start(0, 1, 0)], noise=0.25, seed=3)
        seen.append((views, episode))
        env.close()
    (here, one), (there, other) = seen
    assert np.array_equal(here[0]["image"], there[0]["image"])
    for a, b in zip(here[1:], there[1:], strict=True):
        assert np.array_equal(a[0]["image"], b[0]["image"])
        for frames, others in zip(a[-1]["frames"], b[-1]["frames"], strict=True):
            assert all(np.array_equal(frames[k], others[k]) for k in ("image", "dones", "steps"))
    assert np.array_equal(one.images, other.images)
    assert one.success
    assert (one.benchmark, one.suite, one.instruction) == (
        "rails", "blocks", "put the red block on the pad")  # fmt: skip


def test_episodes_come_back_as_they_were_and_not_to_another_benchmark(own, tmp_path):
    env = reality.make_env(own)
    env.record_every, env.terminate = 4, "never"
    folder = own.run_dir / "data" / "demonstrations"
    made = env.demonstrate([Start(0, 0, 0), Start(1, 1, 0)], noise=0.25, seed=0, record_every=3)
    with DatasetWriter(folder) as writer:
        for episode in made:
            writer.append(episode)
    read = read_episodes(folder)
    for a, b in zip(made, read, strict=True):
        for name in ("actions", "images", "proprio", "frame_steps", "dones"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert (a.benchmark, a.suite, a.task) == (b.benchmark, b.suite, b.task)
    facts = look_into(folder / "blocks" / "0_put_the_red_block_on_the_pad_demo.hdf5")
    assert (facts.benchmark, facts.task, facts.demos, facts.side) == ("rails", 0, 1, 64)
    run = Run(own)
    assert len(collect.recorded(run, "demonstrations")) == 2
    run.close()
    stranger = Run(replace(preset("smoke"), run_dir=own.run_dir, device="cpu"))
    words = ("expected one of libero libero_spatial", "got one of rails blocks")
    refused(lambda: collect.recorded(stranger, "demonstrations"), *words)
    stranger.close()
    model = store.build("reflector", own)
    store.save("reflector", model, tmp_path / "r.safetensors", own.env)
    other = replace(own, env=replace(own.env, tasks=(1,)))
    refused(
        lambda: store.load("reflector", tmp_path / "r.safetensors", fits=other), "on tasks 0 of"
    )
    seen = store.shown({"shown": {"benchmark": "else", "suite": "blocks", "tasks": [0]}}, tmp_path)
    refused(lambda: store.check_shown(seen, own.env, "x"), "blocks (else)", "blocks (rails)")


def test_what_cannot_be_demonstrated_says_what_can(own, monkeypatch):
    monkeypatch.delattr(find(OWN).simulator, "expert")
    refused(
        lambda: collect.record_expert(own, 1, own.run_dir), "expert of rails is missing", "--data"
    )
    monkeypatch.undo()
    refused(lambda: collect.record_expert(own, 51, own.run_dir), "at most 50", "got 51")
