"""Trained models on disk: weights beside the configuration that built them."""

import hashlib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from worldenv.config import (
    CollectConfig,
    Config,
    EnvConfig,
    PolicyConfig,
    PosttrainConfig,
    ReflectorConfig,
    SimulatorConfig,
)
from worldenv.data.embodiment import Embodiment, differences
from worldenv.envs.benchmark import find
from worldenv.fields import from_dict, to_dict
from worldenv.models.folder import digest as digest_of_folder
from worldenv.models.policy import Policy
from worldenv.models.reflector import NOT_CALIBRATED, Reflector
from worldenv.models.simulator import Simulator
from worldenv.models.wan_world import WanSimulator
from worldenv.models.wovr import WoVR
from worldenv.models.wovr_reward import WoVRReflector
from worldenv.runtime import checkpoint, hub, ranks
from worldenv.runtime.errors import NonFiniteError, UserError
from worldenv.stages.reality import embodiment

_SMALL = {
    ("policy", "small"): Policy,
    ("reflector", "small"): Reflector,
    ("reflector", "wovr"): WoVRReflector,
    ("simulator", "small"): Simulator,
    ("simulator", "wan"): WanSimulator,
    ("simulator", "wovr"): WoVR,
}
"""What is imported in no time."""
_KINDS = {"policy": PolicyConfig, "simulator": SimulatorConfig, "reflector": ReflectorConfig}


def build(kind: str, config: Config) -> nn.Module:
    """A new model of `kind` (policy, simulator, reflector) with its preset's sizes, for the robot
    of its benchmark.
    """
    return _build(kind, getattr(config, kind), embodiment(config))


def _build(kind: str, part: object, robot: Embodiment, train: bool = True) -> nn.Module:
    """train: whether what a published policy comes with is made ready to be trained."""
    if (kind, part.kind) in _SMALL:
        return _SMALL[kind, part.kind](part, robot)
    if find_spec("transformers") is None:
        raise UserError(
            f"{kind}.kind {part.kind}: expected transformers, got no such package here. Run "
            "`pip install 'worldenv[models]'`, or choose the small one."
        )
    # They take seconds to import, and the small models do without.
    if kind == "policy":
        from worldenv.models import openvla_folder

        return openvla_folder.load(part, robot, train)
    from worldenv.models.vlm_reflector import ImageTextReflector

    return ImageTextReflector(part, robot)


def save(kind: str, model: nn.Module, path: Path, shown: EnvConfig | None = None) -> None:
    """Write (rank 0) a model with what is needed to build it again: its own sizes, and its robot.

    shown: where the episodes come from that a simulator or reflector has seen: what it may be used
    for.
    """
    if not ranks.lead():
        return
    metadata = {
        **({"folder_digests": digests(model.config)} if model.config.reads else {}),
        "kind": kind,
        "config": to_dict(model.config),
        "embodiment": to_dict(model.embodiment),
        **({"shown": _seen(shown)} if shown else {}),
    }
    checkpoint.save(path, checkpoint.weights(model, holds_all(kind)), metadata)


def _seen(env: EnvConfig) -> dict:
    """Suite and tasks, and whose: by its name, in whatever way it was named."""
    return {"benchmark": find(env.benchmark).name, "suite": env.suite, "tasks": env.tasks}


def locate(kind: str, named: Path) -> Path:
    """What is meant by the name of a policy, simulator, reflector (its file) or of data: a path, a
    folder that worldenv-push wrote, or else `user/name@revision` on the hub, which is fetched.

    UserError as of `hub.fetch`, and for a folder or repository without weights that can be read.
    """
    repository = hub.parse(str(named))
    if named.exists() or repository is None or named.suffix in (".safetensors", ".hdf5", ".h5"):
        return hub.checkpoint_in(named) if kind != "data" and named.is_dir() else named
    try:
        found = hub.fetch(*repository, *(("dataset",) if kind == "data" else ("model", hub.MODEL)))
    except UserError as error:
        raise UserError(f"There is no {named} here. On the hub: {error}") from error
    print(f"{kind}: {repository[0]}@{found.commit}, {found.folder}")
    return found.folder if kind == "data" else hub.checkpoint_in(found.folder)


def export(policy: nn.Module, folder: Path) -> None:
    """Leave what was trained of a published policy in `folder` as others' tools read it: adapters
    as peft writes them, heads as the published loader finds them. Of a small one: nothing."""
    if policy.config.kind != "small" and ranks.lead():
        from worldenv.models import openvla_adapter  # peft takes seconds to import

        openvla_adapter.export(policy, folder)


def digests(part: PolicyConfig | SimulatorConfig | ReflectorConfig) -> tuple[str, ...]:
    """Of the published folders that a model is built from; none of a small one."""
    return tuple(map(digest_of_folder, part.reads))


def holds_all(kind: str) -> bool:
    """Whether a checkpoint of this kind holds frozen parameters too. A policy's come from the
    folder it was built from, and may be a thousand times what was trained."""
    return kind != "policy"


def load(
    kind: str, path: Path, device: torch.device | str = "cpu", fits: Config | None = None
) -> nn.Module:
    """Read a model written by `save`, ready for inference. See `read`."""
    tensors, part, robot = read(kind, path, device, fits)
    model = _build(kind, part, robot)
    checkpoint.load_module(model, tensors, path, holds_all(kind))
    return model.to(device).eval()


def read(
    kind: str, path: Path, device: torch.device | str = "cpu", fits: Config | None = None
) -> tuple[dict[str, Tensor], object, Embodiment]:
    """The tensors of a model written by `save`, and the configuration and robot it was built with.

    fits: the configuration it is to be used with, of the same robot, image size and chunk, and of
    tasks that it has seen (`shown`; checkpoints of before do not say).
    UserError naming the file for anything else than a whole model of this kind with finite weights.
    """
    tensors, metadata = checkpoint.load(path, device)
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: expected a {kind} checkpoint, got {metadata.get('kind')!r}")
    part, robot = _facts(kind, metadata, path)
    if fits is not None:
        drawn = getattr(part, "action_map", False)
        check_fits(robot, embodiment(fits), f"{path}: this {kind} was trained", drawn)
        check_shown(shown(metadata, path), fits.env, f"{path}: this {kind} was trained")
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NonFiniteError(
                f"{path}: {name} {list(tensor.shape)}: expected finite weights, got {bad} NaN or "
                f"infinite value(s). This {kind} is of no use: name another, or train it anew."
            )
    if kind == "reflector":
        _check_thresholds(tensors, path)
    metadata = {"folder_digests": [], **metadata}
    _check_folders(part, checkpoint.fact(metadata, "folder_digests", list, path), path)
    return tensors, part, robot


def _check_thresholds(tensors: dict[str, Tensor], path: Path) -> None:
    """UserError for a threshold outside (0, 1). A reflector from before real frames had one of
    their own gets the mark of none, which is said: it can judge imagined frames as ever, and who
    uses it on real ones is refused (`thresholds.of_reality`)."""
    if "threshold" in tensors and "real_threshold" not in tensors:
        print(f"{path}: has no threshold for real frames; it can judge imagined ones only")
        tensors["real_threshold"] = torch.full_like(tensors["threshold"], NOT_CALIBRATED)
    for name in tensors.keys() & {"threshold", "real_threshold"}:
        for eta in tensors[name].flatten().tolist():
            if not 0 < eta < 1 and (name, eta) != ("real_threshold", NOT_CALIBRATED):
                raise UserError(
                    f"{path}: {name}: expected a number above 0 and below 1, got {eta:g}. "
                    "This reflector is of no use: name another, or train it anew."
                )


def _check_folders(part: object, trained: list, path: Path) -> None:
    """UserError unless the published models that `part` names are those that were trained on."""
    if len(trained) != len(part.reads):
        raise UserError(
            f"{path}: metadata 'folder_digests': expected {len(part.reads)}, got {len(trained)}. "
            "Name another checkpoint, or train anew."
        )
    for folder, was, now in zip(part.reads, trained, digests(part), strict=True):
        if was != now:
            raise UserError(
                f"{path}: was trained on another model than {folder} holds now: expected digest "
                f"{str(was)[:12]}, got {now[:12]}. Put the folder back as it was, or train anew."
            )


def check_fits(own: Embodiment, asked: Embodiment, what: str, drawn: bool = False) -> None:
    """UserError that begins with `what` unless both are the same robot, seen and commanded so;
    drawn: from the same places.
    """
    for name, (mine, other) in differences(own, asked, drawn).items():
        if name == "cameras":
            raise UserError(
                f"{what} with an action map of {len(mine)} cameras, got {len(other)} that do not "
                "all stand where those did. Use a checkpoint trained on scenes of the same kind, "
                "or one without action map."
            )
        if name in ("image_size", "chunk"):
            raise UserError(
                f"{what} with env.{name} {mine}, got {other}. Use the preset or the run folder it "
                f"was trained with (or worldenv-train --env.{name.replace('_', '-')} {mine}), or "
                "another checkpoint."
            )
        raise UserError(
            f"{what} for the robot {own.name}, of which {name} is {_words(mine)}; this "
            f"configuration's, {asked.name}, has {_words(other)}. Use a checkpoint of this robot."
        )


def shown(metadata: dict, path: Path) -> EnvConfig | None:
    """Benchmark (by its name), suite and tasks of the episodes that a checkpoint's model has seen,
    if it says so."""
    if "shown" not in metadata:
        return None
    return from_dict(EnvConfig, checkpoint.fact(metadata, "shown", dict, path), f"{path}: shown")


def check_shown(seen: EnvConfig | None, asked: EnvConfig, what: str) -> None:
    """UserError that begins with `what` unless a model has seen the tasks it is asked about."""
    if seen is None:
        return
    name = find(asked.benchmark).name
    same = (seen.benchmark, seen.suite) == (name, asked.suite)
    if same and {*asked.tasks} <= {*seen.tasks}:
        return
    of = (seen.suite, asked.suite)
    if seen.benchmark != name:
        of = (f"{seen.suite} ({seen.benchmark})", f"{asked.suite} ({name})")
    raise UserError(
        f"{what} on tasks {_words(seen.tasks)} of {of[0]}, got tasks {_words(asked.tasks)} of "
        f"{of[1]}. Use one that has seen them, or leave it out and have one trained."
    )


def _words(value: object) -> str:
    entries = [getattr(v, "name", v) for v in value] if isinstance(value, tuple) else [value]
    return ", ".join(map(str, entries))


def _facts(kind: str, metadata: dict, path: Path) -> tuple[object, Embodiment]:
    """Configuration and robot, checked, that a model was built with. Other parts of the
    configuration are not known: what its part asks of them is checked with such as suit all.
    """
    said = checkpoint.fact(metadata, "config", dict, path)
    part = from_dict(_KINDS[kind], said, f"{path}: config")
    said = checkpoint.fact(metadata, "embodiment", dict, path)
    robot = from_dict(Embodiment, said, f"{path}: embodiment")
    try:
        replace(
            Config(),
            env=EnvConfig(image_size=robot.image_size, chunk=robot.chunk),
            collect=CollectConfig(record_every=1, push=0),
            posttrain=PosttrainConfig(push=0),
            **{"simulator": SimulatorConfig(patch=1), kind: part},
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return part, robot


def digest(model: nn.Module) -> str:
    """Of a model's weights: the same for the same policy, whatever file it came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
