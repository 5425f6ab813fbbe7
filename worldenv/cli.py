"""Console scripts, and nothing else: parse, call, print.

A `UserError` is printed without a traceback and exits with 2; Ctrl-C, SIGTERM and SIGHUP exit with
128 and the signal's number after the stage in progress has saved what it had. The scripts begin in
`entry`, which can be stopped while this module is being imported.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro

from worldenv import doctor as doctor_module
from worldenv import export as export_module
from worldenv import launch
from worldenv import push as push_module
from worldenv.config import Config, load
from worldenv.data.episodes import read_episodes
from worldenv.envs.benchmark import begun
from worldenv.envs.benchmark import check as check_benchmark
from worldenv.fields import Items, Range
from worldenv.models.policy import Policy
from worldenv.presets import NAMES, preset
from worldenv.ranges import (
    Episodes,
    Factor,
    FixtureSeeds,
    FromZero,
    Noise,
    Passes,
    Seed,
    StartNumber,
    StartRange,
    Tasks,
)
from worldenv.report.statistics import wilson
from worldenv.runtime import device as devices
from worldenv.runtime import ranks, signals
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages import collect as collecting
from worldenv.stages import evaluate as evaluating
from worldenv.stages import export as exporting
from worldenv.stages import imagine as imagining
from worldenv.stages import pipeline, store
from worldenv.stages.reality import Reality
from worldenv.stages.run import Run, acting, open_run, world_of, write_json
from worldenv.stages.trial import Trial, run_trial, told
from worldenv.words import parse

Starts = Annotated[tuple[StartNumber, ...], Items()]
_Stage = Literal[
    "all",
    "demonstrations",
    "sft",
    "explore",
    "simulator",
    "distill",
    "reflector",
    "fidelity",
    "posttrain",
    "evaluate",
    "report",
]


@dataclass(frozen=True)
class TrainArguments:
    """Learn a world from a few demonstrations and post-train a policy inside it.

    Without a stage the whole pipeline runs; stages whose artifacts match the configuration are
    skipped, so the same command resumes an interrupted run. Choose a starting point with --preset
    (default, smoke, metaworld, libero-spatial-small, ...) and change any field.
    """

    stage: tyro.conf.Positional[_Stage] = "all"
    """One stage to run, or all of them."""
    round: FromZero = 0
    """Round of that stage (explore, simulator, distill, reflector, fidelity, posttrain)."""
    policy: Path | None = None
    """Use this policy checkpoint, a file or a repository of the hub (user/name@revision), instead
    of training one by imitation. With a named checkpoint, one
    stage first makes what it needs and the run folder lacks, or what follows from the checkpoint.
    """
    simulator: Path | None = None
    """Use this simulator checkpoint (file or repository) for the round, not training one."""
    reflector: Path | None = None
    """Use this reflector checkpoint (file or repository) for the round, not training one."""
    force: bool = False
    """Post-train in a world that the gate refuses too; the record, results and report say so."""
    plan: bool = False
    """Build and write nothing: print parameters, each stage's memory at its highest, the time per
    iteration, and where it does not fit what to change (the exit code is 1 then). Folders that are
    not there yet are planned for with the published sizes."""
    plan_memory: Annotated[float, Range(0, 10**6, above=True)] | None = None
    """GiB to plan for, in place of the device's own: of a GPU too that is not here."""
    plan_ranks: Annotated[int, Range(0, 4096)] = 0
    """Ranks to plan for, each on a device of its own (0: as many as torchrun says, or one): which
    models must be sharded over them, and why."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class EvalArguments:
    """Measure a policy's success in the real benchmark on held-out starts.

    With --simulator: how far a round's learned world can be trusted, on fresh real episodes."""

    run_dir: Path = Path("runs/default")
    """Run folder whose configuration to use."""
    policy: Path | None = None
    """Policy checkpoint, a file or a repository of the hub; default: the run's post-trained one."""
    starts: StartRange | None = None
    """Half-open range of benchmark init states; default: the run's."""
    fixture_seeds: FixtureSeeds | None = None
    """Seeds of the fixture placement; default: the run's."""
    out: Path | None = None
    """Write the episodes' outcomes, or what was measured of the world, to this JSON file."""
    simulator: bool = False
    """Measure the world of a round instead, on fresh real episodes (docs/measures.md)."""
    trial: Annotated[Trial, tyro.conf.arg(name="")] = field(default_factory=Trial)

    def rules(self) -> Iterator[tuple[bool, str, str]]:
        """What goes together."""
        yield (
            self.simulator or self.trial == Trial(),
            "simulator",
            "beside --round and the like",
        )
        for name in ("policy", "starts", "fixture_seeds"):
            yield not self.simulator or getattr(self, name) is None, name, "none with --simulator"


@dataclass(frozen=True)
class CollectArguments:
    """Record episodes in the real benchmark, in LIBERO's HDF5 layout."""

    source: tyro.conf.Positional[Literal["expert", "policy"]] = "expert"
    """Who acts: the scripted expert or a policy checkpoint."""
    out: Path = Path("data")
    """Folder for <suite>/<task>_demo.hdf5."""
    preset: Literal[NAMES] = "default"
    """Preset whose environment settings to use."""
    benchmark: str | None = None
    """A registered name, module:name or a Python file; default: the preset's."""
    suite: str | None = None
    """Of the benchmark's suites; default: the preset's, or the benchmark's first."""
    tasks: Tasks | None = None
    """Task ids; default: the preset's."""
    episodes: Episodes = 5
    """Episodes per task, on starts 0, 1, ..."""
    noise: Noise = 0.25
    """Expert: std of the action noise, relative to the action."""
    policy: Path | None = None
    """Policy: checkpoint to roll out, a file or a repository of the hub (user/name@revision)."""
    push: Noise = 0.0
    """Policy: Laplace scale of a push, the same for all actions of a chunk."""
    scale: Factor = 1.5
    """Policy, without a push: multiple of its Laplace scale."""
    temperature: Factor = 1.0
    """Policy of tokens: what its logits are divided by."""
    assets: Path | None = None
    """Folder with LIBERO's asset files."""
    seed: Seed = 0
    """Seed of fixtures and noise."""


@dataclass(frozen=True)
class ImagineArguments:
    """Show a policy, or recorded actions, in the real world and in the learned one."""

    run_dir: Path = Path("runs/default")
    """Run folder with the simulator and reflector."""
    episodes: Path | None = None
    """HDF5 file (or folder) of recorded episodes to replay; default: roll out the policy."""
    policy: Path | None = None
    """Policy checkpoint, a file or a repository of the hub; default: the run's post-trained one."""
    drive: Literal["actions", "policy"] = "actions"
    """What moves the imagined world: the real episode's actions, or the policy looking at it."""
    starts: Starts = (20, 21)
    """Benchmark init states to roll the policy out from."""
    count: Episodes = 4
    """Recorded episodes to show at most."""
    steps: Passes | None = None
    """Denoising steps per frame; default: the run's."""
    out: Path = Path("imagined")
    """Folder for the videos."""
    lerobot: Path | None = None
    """Besides, write the imagined episodes to this folder as a LeRobotDataset v3.0, with the
    judge's verdicts as rewards."""


def train() -> None:
    """worldenv-train"""
    _guarded(_train)


def evaluate() -> None:
    """worldenv-eval"""
    _guarded(_evaluate)


def collect() -> None:
    """worldenv-collect"""
    _guarded(_collect)


def imagine() -> None:
    """worldenv-imagine"""
    _guarded(_imagine)


def export() -> None:
    """worldenv-export"""
    _guarded(export_module.main)


def play() -> None:
    """worldenv-play"""
    _guarded(_play)


def doctor() -> None:
    """worldenv-doctor"""
    _guarded(doctor_module.main)


def push() -> None:
    """worldenv-push"""
    _guarded(push_module.main)


def _guarded(work: Callable[[], int | None]) -> None:
    with signals.raised():
        try:
            code = work()
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr)
            code = 2
        except KeyboardInterrupt as stop:
            print("\nstopped; the same command goes on from here", file=sys.stderr)
            code = signals.exit_status(stop)
    sys.exit(code or 0)


def _train() -> int | None:
    name = _word(sys.argv[1:], "--preset") or "default"
    base, benchmark = preset(name), _word(sys.argv[1:], "--env.benchmark")
    if benchmark:
        base = replace(base, env=begun(base.env, benchmark))
    arguments = parse(TrainArguments, TrainArguments(config=base))
    if arguments.plan:
        return _plan(arguments)
    pipeline.check_round(arguments.config, arguments.round)
    named = {kind: getattr(arguments, kind) for kind in ("policy", "simulator", "reflector")}
    files = {kind: store.locate(kind, path) for kind, path in named.items() if path is not None}
    paths = tuple(store.locate("data", path) for path in arguments.config.data.paths)
    config = replace(arguments.config, data=replace(arguments.config.data, paths=paths))
    with launch.together(config, files):
        if name == "published-tiny":  # its libraries take seconds to import
            from worldenv.layouts import tiny

            ranks.together(lambda: tiny.prepare(config))
        with closing(Run(config, force=arguments.force)) as run:
            if arguments.stage == "all":
                results = pipeline.run_all(run, files, arguments.round)
            else:
                results = pipeline.run_stage(run, arguments.stage, arguments.round, files)
    if isinstance(results, Path):
        page = run.dir / "report.html"
        print(*[f"report:  {page}"] * page.exists(), f"results: {results}", sep="\n")
    else:
        shown = {k: v for k, v in results.items() if isinstance(v, int | float | str)}
        print("\n".join(f"{k}: {v}" for k, v in shown.items()))


def _plan(arguments: TrainArguments) -> int:
    from worldenv.stages import plan  # for one command; its libraries take seconds to import

    several = arguments.plan_ranks or ranks.announced()
    if arguments.config.preset != "published-tiny":
        return plan.main(arguments.config, arguments.plan_memory, several)
    from worldenv.layouts import tiny

    with tempfile.TemporaryDirectory() as folder:
        config = tiny.moved(arguments.config, Path(folder))
        tiny.prepare(config)
        return plan.main(config, arguments.plan_memory, several)


def _word(argv: list[str], flag: str) -> str:
    """What a flag says that is read first, because it decides other defaults; the last counts."""
    value = ""
    for word, following in pairwise([*argv, ""]):
        if word == flag and not following.startswith("-"):
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


def _evaluate() -> None:
    arguments = parse(EvalArguments)
    if arguments.simulator:
        return _measure(arguments)
    run = open_run(arguments.run_dir)
    policy = _policy(run, arguments.policy)
    part = run.config.evaluate
    part = replace(
        part,
        starts=arguments.starts or part.starts,
        fixture_seeds=arguments.fixture_seeds or part.fixture_seeds,
    )
    run.config = replace(run.config, evaluate=part)
    check_benchmark(run.config)
    starts = evaluating.held_out_starts(run)
    outcomes = evaluating.evaluate_policy(run, policy, starts, "evaluate")
    wins = sum(o["success"] for o in outcomes)
    rate = wilson(wins, len(outcomes))
    print(
        f"success {wins}/{len(outcomes)} = {rate.mean:.1%} "
        f"(95% interval {rate.low:.1%} to {rate.high:.1%})"
    )
    if arguments.out is not None:
        write_json(arguments.out, {"successes": wins, "episodes": outcomes})
    run.close()


def _measure(arguments: EvalArguments) -> None:
    config = load(arguments.run_dir / "config.json")
    with closing(Run(replace(config, run_dir=arguments.run_dir))) as run:
        measured = run_trial(run, arguments.trial)
    if arguments.out is not None:
        write_json(arguments.out, measured)
    print(told(measured))


def _collect() -> None:
    arguments = parse(CollectArguments)
    base = preset(arguments.preset)
    env = begun(base.env, arguments.benchmark) if arguments.benchmark else base.env
    given = {k: v for k in ("suite", "tasks") if (v := getattr(arguments, k)) is not None}
    env = replace(env, assets=arguments.assets, **given)
    config = replace(
        base,
        env=env,
        seed=arguments.seed,
        run_dir=arguments.out,
        collect=replace(
            base.collect,
            demonstration_noise=arguments.noise,
            push=arguments.push,
            scale=arguments.scale,
            temperature=arguments.temperature,
        ),
    )
    if arguments.source == "expert":
        record = collecting.record_expert(config, arguments.episodes, arguments.out)
    else:
        if arguments.policy is None:
            raise UserError("worldenv-collect policy: expected --policy CHECKPOINT, got none")
        policy = store.load("policy", store.locate("policy", arguments.policy), fits=config)
        policy.to(acting(devices.pick(config.device), policy.config))
        with closing(Reality(config)) as reality:
            record = collecting.record_policy(reality, policy, arguments.episodes, arguments.out)
    print(f"{record['successes']} of {record['episodes']} episodes succeeded; in {arguments.out}")


def _imagine() -> None:
    arguments = parse(ImagineArguments)
    run = open_run(arguments.run_dir)
    config = run.config
    last = config.posttrain.rounds - 1
    checkpoints = run.dir / "checkpoints"
    names = {"simulator": world_of(config, last), "reflector": f"reflector-{last}"}
    pipeline.check_made(run, names.values())
    simulator, reflector = (
        store.load(kind, checkpoints / f"{name}.safetensors", run.device, config)
        for kind, name in names.items()
    )
    policy = None
    if arguments.episodes is None or arguments.drive == "policy":
        policy = _policy(run, arguments.policy)
    if arguments.episodes is not None:
        episodes = read_episodes(arguments.episodes, config.env.image_size)[: arguments.count]
    else:
        seed = derive(config.seed, "imagine fixture") % 2**31
        task = config.env.tasks[0]
        starts = [evaluating.Start(task, index, seed) for index in arguments.starts]
        episodes = imagining.real_episodes(run, policy, starts)
    with exporting.kept(arguments.lerobot, run.embodiment) as keep:
        paths = imagining.imagine(
            run,
            episodes,
            simulator,
            reflector,
            arguments.out,
            "imagined",
            drive=arguments.drive,
            policy=policy,
            steps=arguments.steps or config.sampling_steps(last),
            keep=keep,
        )
    print("\n".join(str(path) for path in paths))
    run.close()


def _play() -> None:
    from worldenv.play import command  # its server, for one command

    command.main(parse(command.PlayArguments))


def _policy(run: Run, named: Path | None) -> Policy:
    """The policy named, or the run's post-trained one."""
    last = run.config.posttrain.rounds - 1
    if named is None:
        pipeline.check_made(run, [f"posttrain-{last}"], ", or name a policy (--policy FILE)")
    path = run.dir / "checkpoints" / f"policy-{last}.safetensors"
    path = path if named is None else store.locate("policy", named)
    policy = store.load("policy", path, fits=run.config)
    return policy.to(acting(run.device, policy.config))
