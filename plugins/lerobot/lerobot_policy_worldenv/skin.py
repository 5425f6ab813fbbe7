"""Between LeRobot's batches and worldenv's observations; imports nothing of LeRobot's.

LeRobot: `observation.images.<camera>` `[B, 3, H, W]` float in [0, 1], `observation.state` `[B, P]`
float, `task` B strings. worldenv: image `[B, V, H, W, 3]` uint8, proprio `[B, P]` float32,
instruction. Pictures come back to the bit: u / 255 * 255 rounds to u for each of the 256.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldenv.data.embodiment import Embodiment
from worldenv.data.episode import area_resize, continuous_axis_angle
from worldenv.data.lerobot.detect import match_cameras
from worldenv.data.lerobot.writer import camera_key
from worldenv.runtime.errors import UserError
from worldenv.stages import store

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."


def checkpoint(kind: str, named: str | None, flag: str) -> Path:
    """File of a policy or reflector: of a file, a folder of worldenv-push, `user/name@revision` on
    the hub, or a run's folder, of which the last round's is taken. UserError as of `store.locate`,
    for a run without one, and for None.
    """
    if named is None:
        raise UserError(
            f"{flag}: expected a {kind}, got none. Name a run's folder, a file, or user/name."
        )
    folder = Path(named) / "checkpoints"
    if not folder.is_dir():
        return store.locate(kind, Path(named))
    rounds = {file.stem.removeprefix(f"{kind}-"): file for file in folder.glob(f"{kind}-*")}
    numbers = [n for n, file in rounds.items() if n.isdigit() and file.suffix == ".safetensors"]
    if not numbers:
        others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
        raise UserError(
            f"{folder}: expected {kind}-0.safetensors or a later round's, got {others or 'none'}. "
            f"Let worldenv-train finish a round, or name the file: {flag} FILE."
        )
    return rounds[max(numbers, key=int)]


class Skin:
    """A robot's observations and actions as LeRobot has them."""

    def __init__(
        self, robot: Embodiment, features: Mapping[str, Sequence[int]], cameras: Sequence[str],
        flag: str,
    ) -> None:  # fmt: skip
        """features: shapes, without B, of what LeRobot says that there is; cameras: keys in the
        order of the robot's views, empty to tell them by their names; flag: says them.

        UserError for other cameras, and for a state or action of another robot.
        """
        self.robot = robot
        have = [key for key in features if key.startswith(IMAGES)]
        self.cameras, self.by = match_cameras(have, robot, cameras, "LeRobot's observations", flag)
        for key, names in ((STATE, [e.name for e in robot.proprio]), (ACTION, robot.action)):
            if key in features:
                self._check(key, tuple(features[key]), (len(names),), ", ".join(names))

    def observation(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """What worldenv's models are shown of a batch. UserError for keys that lack, and for other
        shapes and numbers.
        """
        state = self._of(batch, STATE)
        self._check(STATE, tuple(state.shape[1:]), (self.robot.P,), "the robot's state")
        count = len(state)
        pictures = torch.stack([self._picture(batch, key, count) for key in self.cameras], 1)
        words = batch.get("task")
        if words is None or isinstance(words, str) or len(words) != count:
            raise UserError(
                f"task: expected {count} instructions, one for each row, got {words!r}. Use an "
                "environment that has task_description, or give the batch a list `task`."
            )
        return {
            "image": pictures.to(device),
            "proprio": torch.from_numpy(self._proprio(state)).to(device),
            "instruction": tuple(words),
        }

    def _proprio(self, state: Tensor) -> np.ndarray:
        """As the robot's own: LeRobot writes turns of about half a circle with either sign."""
        proprio = state.detach().float().cpu().numpy().copy()
        turned = list(self.robot.entries("rotation"))
        if len(turned) == 3:
            proprio[:, turned] = continuous_axis_angle(proprio[:, turned])
        return proprio

    def _picture(self, batch: Mapping[str, Any], key: str, count: int) -> Tensor:
        """`[B, H, W, 3]` uint8 of the robot's size."""
        picture = self._of(batch, key)
        shape = tuple(picture.shape)
        if picture.ndim != 4 or shape[:2] != (count, 3):
            raise UserError(
                f"{key}: expected [{count}, 3, H, W], a picture for each row of the state, got "
                f"{list(shape)}. Name other cameras, or mend the environment."
            )
        if picture.dtype != torch.uint8:
            low, high = (float(x) for x in picture.aminmax())
            if not 0 <= low <= high <= 1:
                raise UserError(
                    f"{key}: expected numbers from 0 to 1, got {low:g} to {high:g}. Leave pictures "
                    "as LeRobot's preprocess_observation makes them: no normalisation."
                )
            picture = (picture.float() * 255).round().to(torch.uint8)
        upright = picture.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.from_numpy(area_resize(upright, self.robot.image_size, key))

    def _of(self, batch: Mapping[str, Any], key: str) -> Tensor:
        if not isinstance(batch.get(key), Tensor):
            there = ", ".join(sorted(k for k in batch if k.startswith("observation")))
            raise UserError(f"{key}: expected a tensor, got none. There is: {there or 'nothing'}.")
        return batch[key]

    def _check(self, key: str, got: tuple[int, ...], asked: tuple[int, ...], what: str) -> None:
        if got != asked:
            raise UserError(
                f"{key}: expected {list(asked)} ({what}) of {self.robot.name}, got {list(got)}. "
                "This is another robot, or another control mode: use a policy that knows it."
            )


def features(robot: Embodiment) -> dict[str, tuple[int, ...]]:
    """Shapes, without B, of what the imagined world shows and takes, by LeRobot's keys; pictures
    `[H, W, 3]`."""
    side = robot.image_size
    return {
        ACTION: (robot.A,),
        "agent_pos": (robot.P,),
        **{camera_key(view): (side, side, 3) for view in robot.views},
    }


def shown(robot: Embodiment, seen: Mapping[str, Any]) -> dict[str, Any]:
    """An observation of worldenv's as a LeRobot environment gives it: arrays of the host's own."""
    image, proprio = (np.array(torch.as_tensor(seen[k]).cpu()) for k in ("image", "proprio"))
    names = [camera_key(view).removeprefix(IMAGES) for view in robot.views]
    pixels = {name: np.ascontiguousarray(image[:, v]) for v, name in enumerate(names)}
    return {"pixels": pixels, "agent_pos": proprio}
