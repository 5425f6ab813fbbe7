"""WoVR's reward networks, as their folders have them: is this image a success?

    judge = load_reward(Path("RLinf-Wan-LIBERO-Spatial"))  # resnet_rm.pth
    judge = load_reward(Path("RLinf-Wan-LIBERO-Goal"), tasks)  # taskemb_resnet_rm.pth

Two are published (github RLinf: the Wan environment and its configurations say which is used where;
the network's source is in public forks, and the published size of Goal's file, 45,379,978 bytes, is
that of these tensors plus 36 kB of names): a ResNet of 18 layers with biases in its convolutions,
ending in one number; and one whose features are joined with an embedding of the task. Both take one
upright image of the third-person camera, trained at 256 x 256, in [-1, 1].

They round their sigmoid; here it is the reward, and the threshold of a half does the same.
Liberties: they are asked about every frame of a chunk and one success among them ends the episode;
our environments show a judge the last frame of each chunk. Module paths are the published ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldenv.config import ReflectorConfig
from worldenv.data.embodiment import Embodiment
from worldenv.models.pixels import to_unit
from worldenv.models.reflector import thresholds
from worldenv.models.weights import fill, read_pth
from worldenv.runtime.errors import UserError, unknown

FILES = ("resnet_rm.pth", "taskemb_resnet_rm.pth")


class Residual(nn.Module):
    """Two convolutions and a way past them; at `stride` 2 that one narrows too."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv3 = nn.Conv2d(before, after, 1, stride) if stride > 1 else None
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.conv3 is None else self.conv3(x)))


def encoder(width: int) -> list[nn.Module]:
    """Images `[N, 3, H, W]` to features `[N, 8 * width]`, in seven steps."""
    stem = (nn.Conv2d(3, width, 7, 2, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    stages = [nn.Sequential(Residual(width, width), Residual(width, width))]
    for w in (width, 2 * width, 4 * width):
        stages.append(nn.Sequential(Residual(w, 2 * w, 2), Residual(2 * w, 2 * w)))
    return [nn.Sequential(*stem), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


class ImageNet(nn.Module):
    """`resnet_rm.pth`: probability of success `[N, 1]` from an image alone."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(*encoder(width), nn.Linear(8 * width, 1), nn.Sigmoid())

    def forward(self, images: Tensor, task: Tensor | None) -> Tensor:
        return self.net(images)


class TaskNet(nn.Module):
    """`taskemb_resnet_rm.pth`: the same from an image `[N, 3, H, W]` and a task `[N]` int64."""

    def __init__(self, width: int = 64, tasks: int = 10, dim: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.visual_encoder = nn.Sequential(*encoder(width))
        self.task_embedding = nn.Embedding(tasks, dim)
        self.fusion_layer = nn.Sequential(
            nn.Linear(8 * width + dim, hidden),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, 1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor, task: Tensor) -> Tensor:
        features = [self.visual_encoder(images), self.task_embedding(task)]
        return self.fusion_layer(torch.cat(features, -1))


class WoVRReward(nn.Module):
    """A reward model (`envs.imagined.RewardModel`) around one of the networks.

    tasks: the instructions it was trained on, in the order of its embedding (of a suite: sorted);
    empty for a network without one. view: the third-person camera among a frame's.
    """

    def __init__(
        self,
        network: ImageNet | TaskNet,
        tasks: Sequence[str] = (),
        view: int = 0,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.tasks = {task: i for i, task in enumerate(tasks)}
        self.view, self.threshold = view, threshold
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """It stays as it is: batch statistics are not for judging."""
        return super().train(False)

    def onlooker(self, batch: int) -> "Watcher":
        """One that watches B episodes."""
        return Watcher(self)

    @torch.no_grad()
    def forward(self, image: Tensor, instruction: Sequence[str]) -> Tensor:
        """Probability of success `[B]` of images `[B, V, H, W, 3]` uint8. UserError for an
        instruction it was not trained on."""
        device, task = next(self.parameters()).device, None
        if self.tasks:
            for words in {*instruction} - self.tasks.keys():
                raise unknown("instruction", words, self.tasks)
            task = torch.tensor([self.tasks[words] for words in instruction]).to(device)
        x = to_unit(image[:, self.view].to(device)).permute(0, 3, 1, 2)
        return self.network(x, task)[:, 0]


class WoVRReflector(nn.Module):
    """The reward network of a WoVR folder as a run's reflector: nothing is trained but the
    thresholds, which are calibrated, and no weights are in its state dict."""

    frozen = True

    def __init__(self, config: ReflectorConfig, embodiment: Embodiment) -> None:
        super().__init__()
        self.config, self.embodiment = config, embodiment
        self._reward = [load_reward(config.folder, config.tasks)]  # a list: its weights stay out
        for name, eta in thresholds(config).items():
            self.register_buffer(name, eta)
        self.register_buffer("proprio_mean", torch.zeros(embodiment.P))
        self.register_buffer("proprio_std", torch.ones(embodiment.P))

    @property
    def reward(self) -> WoVRReward:
        """The network."""
        return self._reward[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Wherever the thresholds go, the network goes too."""
        self.reward._apply(fn)
        return super()._apply(fn, recurse)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """It does not look at proprio."""

    def onlooker(self, batch: int) -> "Watcher":
        """A judge of B episodes."""
        return self.reward.onlooker(batch)

    def forward(self, image: Tensor, proprio: Tensor, instruction: Sequence[str]) -> Tensor:
        """Logits `[B, F]` of whole sequences `[B, F, V, H, W, 3]` uint8."""
        frames = image.shape[1]
        words = [w for w in instruction for _ in range(frames)]
        odds = self.reward(image.flatten(0, 1), words).view(-1, frames)
        return torch.logit(odds, 1e-7)


class Watcher:
    """It has no memory: every frame is judged by itself."""

    def __init__(self, reward: WoVRReward) -> None:
        self.reward = reward

    def reset(self, rows: Tensor) -> None:
        """Nothing to forget."""

    def watch(
        self, image: Tensor, proprio: Tensor, instruction: Sequence[str], rows: Tensor
    ) -> Tensor:
        """Reward R `[B]` in [0, 1] of the frames `[B, V, H, W, 3]`."""
        return self.reward(image, instruction)


def load_reward(
    path: Path, tasks: Sequence[str] = (), *, view: int = 0, threshold: float = 0.5
) -> WoVRReward:
    """The reward model of a WoVR folder, or of the one file named.

    tasks: as `WoVRReward`'s; needed by a network with an embedding of tasks, unused by the other.
    UserError for no file or two, a damaged or foreign one, and too few or too many tasks.
    """
    found = [path] if path.is_file() else [p for n in FILES if (p := path / n).is_file()]
    if len(found) != 1:
        got = " and ".join(p.name for p in found) or (
            "neither" if path.exists() else "no such folder"
        )
        raise UserError(
            f"{path}: expected one reward network, {' or '.join(FILES)}; got {got}. Name the file."
        )
    tensors = read_pth(found[0])
    network = _network(tensors, found[0])
    if not isinstance(network, TaskNet):
        tasks = ()
    elif len(tasks) != (count := network.task_embedding.num_embeddings):
        raise UserError(
            f"{found[0]}: task_embedding.weight: expected instructions for its {count} tasks, got "
            f"{len(tasks)}. Name the suite it was trained on."
        )
    fill(network, tensors, found[0])
    return WoVRReward(network, tasks, view, threshold)


def _network(tensors: dict[str, Tensor], path: Path) -> ImageNet | TaskNet:
    """The network, on `meta`, whose tensors these are, by their names and shapes."""
    names = ("net.0.0.weight", "visual_encoder.0.0.weight")
    stem = next((tensors[name] for name in names if name in tensors), None)
    if stem is None or stem.ndim != 4:
        some = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"{path}: expected a reward network of WoVR, whose first tensor is "
            f"{' or '.join(names)} [64, 3, 7, 7]; got {some}. Name one of {', '.join(FILES)}."
        )
    with torch.device("meta"):
        if names[0] in tensors:
            return ImageNet(len(stem))
        embedding, hidden = tensors.get("task_embedding.weight"), tensors.get("fusion_layer.0.bias")
        if embedding is None or embedding.ndim != 2 or hidden is None:
            return TaskNet(len(stem))  # as published; `fill` names what differs
        return TaskNet(len(stem), *embedding.shape, len(hidden))
