"""Training windows cut from episodes: frames one chunk apart for the world, single steps for
imitation.

Everything lies in memory as torch tensors and a batch is one gather by index; batches are drawn by
an explicit torch.Generator on the CPU, so that a step can be drawn again bit for bit. Liberty: all
frames are held uncompressed (64 px and two views: 24 KB a frame), which suits thousands of
episodes, not millions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from worldenv.data.episode import Episode
from worldenv.runtime.errors import UserError


@dataclass(frozen=True)
class FrameSequence:
    """Frames of one episode at the rhythm the policy looks: one before each chunk, one after the
    last.

    images [F, V, H, W, 3] uint8, proprio [F, P] float32, actions [F-1, C, A] float32 (actions[f]
    leads from frame f to f + 1), success [F] bool (reached before the frame), steps [F] int64
    (actions executed before the frame). `episode` is the place of the source in the list given to
    chunk_sequences.
    """

    images: Tensor
    proprio: Tensor
    actions: Tensor
    success: Tensor
    steps: Tensor
    episode: int
    task: int
    instruction: str

    def __len__(self) -> int:
        """Number of frames F."""
        return len(self.steps)


def padded_chunks(actions: np.ndarray, steps: np.ndarray, chunk: int) -> np.ndarray:
    """The `chunk` actions from each step: actions [T, A], steps [N] -> [N, C, A].

    Beyond the last action: no motion, and the last gripper command.
    """
    rest = np.zeros((chunk, actions.shape[1]), actions.dtype)
    rest[:, -1] = actions[-1, -1]
    padded = np.concatenate([actions, rest])
    return padded[np.asarray(steps)[:, None] + np.arange(chunk)]


def chunk_sequences(episodes: Sequence[Episode], chunk: int = 8) -> list[FrameSequence]:
    """Frame sequences at a stride of `chunk` actions.

    An episode recorded at every step yields up to `chunk` sequences, one for each offset; one
    recorded at chunk boundaries yields one. The observation after the last action closes a sequence
    even when fewer than `chunk` actions lead to it: that chunk is padded as in padded_chunks.
    Places without a successor are left out. UserError when no episode has two frames one chunk
    apart.
    """
    sequences = []
    for number, episode in enumerate(episodes):
        for rows in _chains(episode.frame_steps, len(episode), chunk):
            steps = episode.frame_steps[rows]
            sequences.append(
                FrameSequence(
                    images=torch.from_numpy(np.ascontiguousarray(episode.images[rows])),
                    proprio=torch.from_numpy(episode.proprio[rows].astype(np.float32)),
                    actions=torch.from_numpy(padded_chunks(episode.actions, steps[:-1], chunk)),
                    success=torch.from_numpy(episode.success_before(steps)),
                    steps=torch.from_numpy(steps.astype(np.int64)),
                    episode=number,
                    task=episode.task,
                    instruction=episode.instruction,
                )
            )
    if episodes and not sequences:
        raise UserError(
            f"expected episodes with frames {chunk} actions apart, got frames at steps "
            f"{episodes[0].frame_steps[:6].tolist()}... "
            f"Record with record_every a divisor of {chunk}."
        )
    return sequences


def from_first_step(sequences: Sequence[FrameSequence]) -> list[FrameSequence]:
    """Those that begin with their episode: one per episode, at the places the policy decided."""
    return [s for s in sequences if int(s.steps[0]) == 0]


def _chains(frame_steps: np.ndarray, steps: int, chunk: int) -> list[np.ndarray]:
    """Row indices of maximal runs of frames `chunk` apart, at least two; T may end one early."""
    row_of = {int(step): row for row, step in enumerate(frame_steps)}
    chains = []
    for first in row_of:
        if first - chunk in row_of:
            continue
        rows, step = [row_of[first]], first
        while step + chunk in row_of:
            step += chunk
            rows.append(row_of[step])
        if steps - chunk < step < steps and steps in row_of:
            rows.append(row_of[steps])
        if len(rows) > 1:
            chains.append(np.array(rows))
    return chains


def _draw(generator: torch.Generator, batch: int, count: int, weights: Tensor | None) -> Tensor:
    """Indices [B] with replacement, uniform or by weight; bit-exact for a generator's state."""
    if weights is None:
        return torch.randint(count, (batch,), generator=generator)
    # Inverse of the cumulative sum: torch.multinomial is limited to 2^24 entries.
    total = weights.cumsum(0)
    point = torch.rand(batch, generator=generator, dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, point, right=True).clamp_(max=count - 1)


def _per_item(weights: Sequence[float] | None, items: int, owner: Tensor) -> Tensor | None:
    """Weights of sequences or episodes [items] spread over the windows they own."""
    if weights is None:
        return None
    values = torch.as_tensor(weights, dtype=torch.float64)
    usable = values.shape == (items,) and bool((values >= 0).all())
    if not usable or not float(values[owner].sum()) > 0:
        raise UserError(
            f"weights: expected {items} finite non-negative numbers with a positive sum, got "
            f"{list(values.shape)} values from {float(values.min()) if len(values) else None}. "
            "Give one weight for each sequence or episode."
        )
    return values[owner]


class FrameWindows:
    """Windows of F consecutive frames that end anywhere in a sequence and never leave it.

    A window that would begin before its sequence is padded on the left with the first frame, marked
    invalid; with padded=False only windows that lie wholly within a sequence are drawn. For F = 1
    every frame is a window; otherwise those with at least one transition.

    For sampling, weights: one number per sequence; emphasis: of each sequence a factor `[F]` for
    windows that end with each of its frames.
    """

    def __init__(
        self,
        sequences: Sequence[FrameSequence],
        frames: int,
        weights: Sequence[float] | None = None,
        padded: bool = True,
        emphasis: Sequence[Tensor] | None = None,
    ) -> None:
        if not sequences or frames < 1:
            raise UserError(
                f"expected at least one sequence and one frame, got {len(sequences)} and {frames}. "
                "Collect episodes first."
            )
        self.frames = frames
        self.instructions = {s.task: s.instruction for s in sequences}
        self.images = torch.cat([s.images for s in sequences])
        self.proprio = torch.cat([s.proprio for s in sequences])
        # Row f holds the chunk that led to frame f; nothing led to a sequence's first frame.
        zeros = torch.zeros_like(sequences[0].actions[:1])
        self.actions = torch.cat([t for s in sequences for t in (zeros, s.actions)])
        self.success = torch.cat([s.success for s in sequences])
        self.steps = torch.cat([s.steps for s in sequences])
        lengths = torch.tensor([len(s) for s in sequences])
        base = lengths.cumsum(0) - lengths
        owner = torch.arange(len(sequences)).repeat_interleave(lengths)
        self._first = base[owner]
        self._task = torch.tensor([s.task for s in sequences])[owner]
        self._episode = torch.tensor([s.episode for s in sequences])[owner]
        rows = torch.arange(len(owner))
        least = min(frames - 1, 1) if padded else frames - 1
        self._ends = rows[rows - self._first >= least]
        self._reached = rows[rows > self._first]
        if not len(self._ends):
            raise UserError(
                f"expected a sequence of at least {least + 1} frames, got none longer than "
                f"{int(lengths.max())}. Collect longer episodes or use shorter windows."
            )
        self._weights = _per_item(weights, len(sequences), owner[self._ends])
        if emphasis is not None:
            factor = torch.cat(list(emphasis)).double()[self._ends]
            self._weights = factor if self._weights is None else factor * self._weights

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._ends)

    def to(self, device: torch.device | str) -> FrameWindows:
        """Move the frames to a device; indices are still drawn on the CPU. Returns self."""
        for name in ("images", "proprio", "actions", "success", "steps"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def sample(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """A batch of B windows drawn with replacement by a CPU generator; see `batch` for its
        content. Besides, reference [B, V, H, W, 3] uint8: the first frame of the sequence or,
        half of the time, any frame up to the window's first.
        """
        windows = _draw(generator, batch, len(self), self._weights)
        ends = self._ends[windows]
        first = self._first[ends]
        begin = torch.maximum(ends - self.frames + 1, first)
        any_of_them, place = torch.rand(2, batch, generator=generator)
        offset = (any_of_them < 0.5) * place * (begin - first + 1)
        rows = (first + offset.long()).to(self.images.device)
        return {**self.batch(windows), "reference": self.images[rows]}

    def transitions(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """B steps between consecutive frames without their pictures, drawn uniformly.

        Returns proprio, next_proprio, previous_proprio [B, P], and action, previous_action
        [B, C, A]: the chunk from the frame and the one that led there (see `batch`).
        """
        after = self._reached[_draw(generator, batch, len(self._reached), None)]
        reached = after.to(self.images.device)
        return {
            "proprio": self.proprio[reached - 1],
            "action": self.actions[reached],
            "next_proprio": self.proprio[reached],
            **self._before(after - 1),
        }

    def _before(self, rows: Tensor) -> dict[str, Tensor]:
        """What was before frames [B]: at a sequence's first the frame itself, and zeros."""
        device = self.images.device
        earlier = torch.maximum(rows - 1, self._first[rows])
        return {
            "previous_proprio": self.proprio[earlier.to(device)],
            "previous_action": self.actions[rows.to(device)],
        }

    def batch(self, windows: Tensor) -> dict[str, Tensor]:
        """Windows by index [B] in 0..len-1.

        Returns image [B, F, V, H, W, 3] uint8, proprio [B, F, P], action [B, F, C, A] (action[:, f]
        leads to frame f; zeros where the frame before it is outside the window), previous_proprio
        [B, P] and previous_action [B, C, A] (of the frame before the window and from there; where
        there is none the first frame's own and zeros), valid [B, F] bool, success [B, F] bool,
        steps [B, F] int64, task [B] int64, episode [B] int64.
        """
        ends = self._ends[windows]
        rows = ends[:, None] + torch.arange(1 - self.frames, 1)
        first = self._first[ends][:, None]
        valid = rows >= first
        rows = torch.maximum(rows, first)
        device = self.images.device
        index, inside = rows.to(device), valid.to(device)
        led = inside.clone()
        led[:, 0] = False
        return {
            "image": self.images[index],
            "proprio": self.proprio[index],
            "action": self.actions[index] * led[..., None, None],
            **self._before(rows[:, 0]),
            "valid": inside,
            "success": self.success[index],
            "steps": self.steps[index],
            "task": self._task[ends].to(device),
            "episode": self._episode[ends].to(device),
        }


class ActionWindows:
    """Every recorded frame with the chunk of actions that followed it, for imitation.

    weights: one number per episode, for sampling.
    """

    def __init__(
        self, episodes: Sequence[Episode], chunk: int = 8, weights: Sequence[float] | None = None
    ) -> None:
        # A frame after the last action has nothing to imitate.
        rows = [np.flatnonzero(e.frame_steps < len(e)) for e in episodes]
        if not sum(len(r) for r in rows):
            raise UserError(
                f"expected episodes with frames before their actions, got {len(episodes)} "
                "episode(s) without any. Record demonstrations with images at every step."
            )
        self.instructions = {e.task: e.instruction for e in episodes}
        pairs = list(zip(episodes, rows, strict=True))
        self.images = torch.from_numpy(np.concatenate([e.images[r] for e, r in pairs]))
        self.proprio = torch.from_numpy(np.concatenate([e.proprio[r] for e, r in pairs]))
        self.actions = torch.from_numpy(
            np.concatenate([padded_chunks(e.actions, e.frame_steps[r], chunk) for e, r in pairs])
        )
        lengths = torch.tensor([len(r) for r in rows])
        owner = torch.arange(len(rows)).repeat_interleave(lengths)
        self._task = torch.tensor([e.task for e in episodes])[owner]
        self._weights = _per_item(weights, len(rows), owner)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.actions)

    def to(self, device: torch.device | str) -> ActionWindows:
        """Move the samples to a device; indices are still drawn on the CPU. Returns self."""
        for name in ("images", "proprio", "actions"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def sample(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """A batch of B samples drawn with replacement by a CPU generator; see `batch`."""
        return self.batch(_draw(generator, batch, len(self), self._weights))

    def batch(self, samples: Tensor) -> dict[str, Tensor]:
        """Samples by index [B]: image [B, V, H, W, 3] uint8, proprio [B, P], action [B, C, A], task
        [B].
        """
        index = samples.to(self.images.device)
        return {
            "image": self.images[index],
            "proprio": self.proprio[index],
            "action": self.actions[index],
            "task": self._task[samples].to(index.device),
        }


@dataclass(frozen=True)
class NormalizationStats:
    """Mean, standard deviation and the 1% / 99% quantiles of proprio [P] and actions [A], float32.

    Standard deviations have a floor of 1e-3, so that a coordinate that never moved stays finite.
    """

    proprio_mean: Tensor
    proprio_std: Tensor
    proprio_low: Tensor
    proprio_high: Tensor
    action_mean: Tensor
    action_std: Tensor
    action_low: Tensor
    action_high: Tensor

    @classmethod
    def from_episodes(cls, episodes: Sequence[Episode]) -> NormalizationStats:
        """Statistics over all frames and all actions of the episodes."""
        if not episodes:
            raise UserError(
                "expected at least one episode to normalise by, got none. Collect data first."
            )
        found = {}
        for name, rows in (
            ("proprio", np.concatenate([e.proprio for e in episodes])),
            ("action", np.concatenate([e.actions for e in episodes])),
        ):
            values = rows.astype(np.float64)
            found[f"{name}_mean"] = values.mean(0)
            found[f"{name}_std"] = np.maximum(values.std(0), 1e-3)
            found[f"{name}_low"], found[f"{name}_high"] = np.quantile(values, (0.01, 0.99), axis=0)
        return cls(**{k: torch.from_numpy(v.astype(np.float32)) for k, v in found.items()})

    def to_tensors(self, prefix: str = "normalization.") -> dict[str, Tensor]:
        """Named tensors to save beside a model's weights."""
        return {prefix + name: value for name, value in asdict(self).items()}

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], prefix: str = "normalization."
    ) -> NormalizationStats:
        """The inverse of to_tensors; other tensors are ignored, missing ones are a UserError."""
        names = list(cls.__dataclass_fields__)
        missing = [prefix + n for n in names if prefix + n not in tensors]
        if missing:
            raise UserError(
                f"expected normalisation statistics in the checkpoint, got none of {missing}. "
                "Train the policy again, or load the checkpoint it was saved in."
            )
        return cls(**{n: tensors[prefix + n] for n in names})
