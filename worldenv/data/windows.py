"""Training windows cut from episodes: frames one chunk apart for the world, single steps for
imitation.

A batch is one gather by index, from tensors in memory or, of episodes whose frames lie on the disk
(`data.disk`), from there; drawn by an explicit torch.Generator on the CPU, so that a step can be
drawn again bit for bit, and the same wherever the frames are. Frames are uncompressed (64 px and
two views: 24 KB each). What is in memory of those on the disk does not grow with their number but
for some indices: a few for each sequence, and eight bytes for each window where they have weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldenv.data.disk import Column, Frames, Rows, Table, Unread
from worldenv.data.episode import Episode
from worldenv.runtime.errors import UserError


@dataclass(frozen=True)
class FrameSequence:
    """Frames of one episode at the rhythm the policy looks: one before each chunk, one after the
    last.

    images [F, V, H, W, 3] uint8, proprio [F, P] float32, actions [F-1, C, A] float32 (actions[f]
    leads from frame f to f + 1), success [F] bool (reached before the frame), steps [F] int64
    (actions executed before the frame). `episode` is the place of the source in the list given to
    chunk_sequences. Images on the disk are read whenever they are looked at.
    """

    images: Tensor = Unread()  # noqa: RUF009 - a descriptor
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

    @property
    def unread(self) -> Tensor | Rows:
        """The images as they are held."""
        return self.__dict__["images"]


def padded_chunks(actions: np.ndarray, steps: np.ndarray, chunk: int) -> np.ndarray:
    """The `chunk` actions from each step: actions [T, A], steps [N] -> [N, C, A].

    Beyond the last action: no motion, and the last gripper command.
    """
    rest = np.zeros((chunk, actions.shape[1]), actions.dtype)
    rest[:, -1] = actions[-1, -1]
    padded = np.concatenate([actions, rest])
    return padded[np.asarray(steps)[:, None] + np.arange(chunk)]


def chunk_sequences(episodes: Sequence[Episode], chunk: int = 8) -> Sequence[FrameSequence]:
    """Frame sequences at a stride of `chunk` actions: a list; `Sequences` of episodes on the disk.

    An episode recorded at every step yields up to `chunk` sequences, one for each offset; one
    recorded at chunk boundaries yields one. The observation after the last action closes a sequence
    even when fewer than `chunk` actions lead to it: that chunk is padded as in padded_chunks.
    Places without a successor are left out. UserError when no episode has two frames one chunk
    apart.
    """
    if any(isinstance(e.images, Frames) for e in episodes):
        sequences: Sequence[FrameSequence] = Sequences(episodes, chunk)
    else:
        sequences = [s for k, e in enumerate(episodes) for s in _cut(e, k, chunk)]
    if episodes and not sequences:
        raise UserError(
            f"expected episodes with frames {chunk} actions apart, got frames at steps "
            f"{episodes[0].frame_steps[:6].tolist()}... "
            f"Record with record_every a divisor of {chunk}."
        )
    return sequences


def _cut(episode: Episode, number: int, chunk: int) -> Iterator[FrameSequence]:
    """The sequences of an episode, in order."""
    for rows in _chains(episode.frame_steps, len(episode), chunk):
        steps = episode.frame_steps[rows]
        yield FrameSequence(
            images=_rows(episode.images, rows),
            proprio=torch.from_numpy(episode.proprio[rows].astype(np.float32)),
            actions=torch.from_numpy(padded_chunks(episode.actions, steps[:-1], chunk)),
            success=torch.from_numpy(episode.success_before(steps)),
            steps=torch.from_numpy(steps.astype(np.int64)),
            episode=number,
            task=episode.task,
            instruction=episode.instruction,
        )


class Sequences(Sequence[FrameSequence]):
    """The sequences of episodes, each made when it is asked for; those of one episode together."""

    def __init__(self, episodes: Sequence[Episode], chunk: int) -> None:
        self._episodes, self._chunk = episodes, chunk
        counts = [len(_chains(e.frame_steps, len(e), chunk)) for e in episodes]
        self._owner = np.repeat(np.arange(len(episodes), dtype=np.int32), counts)
        self._first = np.cumsum(counts) - counts
        self._last: tuple[int, list[FrameSequence]] = (-1, [])

    def __len__(self) -> int:
        return len(self._owner)

    def __getitem__(self, k: int) -> FrameSequence:
        number, last = int(self._owner[k]), self._last
        if last[0] != number:
            last = number, list(_cut(self._episodes[number], number, self._chunk))
            self._last = last
        return last[1][k % len(self) - self._first[number]]


def folder_of(parts: Iterable[Tensor | np.ndarray | Frames | Rows]) -> Path | None:
    """Where the first of images that lie on the disk does; None if all are in memory."""
    for part in parts:
        frames = part.frames if isinstance(part, Rows) else part
        if isinstance(frames, Frames):
            return frames.file.path.parent
    return None


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


def draw(generator: torch.Generator, batch: int, count: int, total: Tensor | None) -> Tensor:
    """Indices [B] of 0..count-1 with replacement, uniform or by the running sum `total` [count] of
    float64 weights; bit-exact for a generator's state."""
    if total is None:
        return torch.randint(count, (batch,), generator=generator)
    # Inverse of the cumulative sum: torch.multinomial is limited to 2^24 entries.
    point = torch.rand(batch, generator=generator, dtype=torch.float64) * total[-1]
    return torch.searchsorted(total, point, right=True).clamp_(max=count - 1)


def _running(weights: Sequence[float] | None, owned: Tensor) -> Tensor | None:
    """Weights of sequences or episodes [N], each given to the windows it owns [N], and summed up
    window by window."""
    if weights is None:
        return None
    values = torch.as_tensor(weights, dtype=torch.float64)
    usable = values.shape == owned.shape and bool((values >= 0).all())
    if not usable or not float(values[owned > 0].sum()) > 0:
        raise UserError(
            f"weights: expected {len(owned)} finite non-negative numbers with a positive sum, got "
            f"{list(values.shape)} values from {float(values.min()) if len(values) else None}. "
            "Give one weight for each sequence or episode."
        )
    return values.repeat_interleave(owned).cumsum(0)


def taken(table: Tensor | Table, index: Tensor) -> Tensor:
    """Rows `[..., *]` of a table by index `[...]`, on its device."""
    if isinstance(table, Table):
        return table.read(index)
    # By whole rows: on a CPU indexing goes number by number, which takes longer.
    found = table.flatten(1).index_select(0, index.reshape(-1)) if table.ndim > 1 else table[index]
    return found.view(*index.shape, *table.shape[1:])


def _sent(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device; on its way to a GPU the host does not wait for it."""
    if device.type == "cpu":
        return batch
    pinned = {k: v if v.is_cuda else v.pin_memory() for k, v in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in pinned.items()}


class _Places:
    """Rows of sequences that lie one after the other, from each one's row `least` on: which is the
    n-th, and whose is a row."""

    def __init__(self, lengths: Tensor) -> None:
        self.base = lengths.cumsum(0) - lengths
        self.lengths = lengths

    def owner(self, rows: Tensor) -> Tensor:
        """The sequence of each row."""
        return torch.searchsorted(self.base, rows.contiguous(), right=True) - 1

    def counts(self, least: int) -> Tensor:
        """How many there are in each sequence."""
        return (self.lengths - least).clamp_(min=0)

    def rows(self, numbers: Tensor, until: Tensor, least: int) -> Tensor:
        """The rows of these numbers; until: the running sum of `counts(least)`."""
        of = torch.searchsorted(until, numbers, right=True)
        return self.base[of] + self.lengths[of] - (until[of] - numbers)


class FrameWindows:
    """Windows of F consecutive frames that end anywhere in a sequence and never leave it.

    A window that would begin before its sequence is padded on the left with the first frame, marked
    invalid; with padded=False only windows that lie wholly within a sequence are drawn. weights:
    one number per sequence, for sampling. For F = 1 every frame is a window; otherwise those with
    at least one transition.
    """

    def __init__(
        self,
        sequences: Sequence[FrameSequence],
        frames: int,
        weights: Sequence[float] | None = None,
        padded: bool = True,
    ) -> None:
        if not sequences or frames < 1:
            raise UserError(
                f"expected at least one sequence and one frame, got {len(sequences)} and {frames}. "
                "Collect episodes first."
            )
        self.frames = frames
        beside = folder_of(s.unread for s in sequences)
        columns = {name: Column(beside) for name in ("proprio", "actions", "success", "steps")}
        images: list[Tensor | Rows] = []
        facts, self.instructions = [], {}
        # Row f holds the chunk that led to frame f; nothing led to a sequence's first frame.
        zeros = torch.zeros_like(sequences[0].actions[:1])
        for s in sequences:
            columns["actions"].add(zeros)
            for name, column in columns.items():
                column.add(getattr(s, name))
            facts.append((len(s), s.task, s.episode))
            self.instructions[s.task] = s.instruction
            if beside is None:
                images.append(s.images)
        self.images: Tensor | Table
        self.images = Table((s.unread for s in sequences), beside) if beside else torch.cat(images)
        self.proprio, self.actions, self.success, self.steps = (
            column.whole() for column in columns.values()
        )
        self.on_disk, self.device = beside is not None, self.images.device
        lengths, self._task, self._episode = torch.tensor(facts).T.contiguous()
        self._places = _Places(lengths)
        self._least = min(frames - 1, 1) if padded else frames - 1
        owned = self._places.counts(self._least)
        self._until = owned.cumsum(0)
        self._reached = self._places.counts(1).cumsum(0)
        if not len(self):
            raise UserError(
                f"expected a sequence of at least {self._least + 1} frames, got none longer than "
                f"{int(lengths.max())}. Collect longer episodes or use shorter windows."
            )
        self._weights = _running(weights, owned)

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._until[-1])

    def to(self, device: torch.device | str) -> FrameWindows:
        """Give batches on a device, and move there what is in memory; indices are still drawn on
        the CPU. Returns self."""
        self.device = torch.device(device)
        if not self.on_disk:
            for name in ("images", "proprio", "actions", "success", "steps"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def sample(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """A batch of B windows drawn with replacement by a CPU generator; see `batch` for its
        content. Besides, reference [B, V, H, W, 3] uint8: the first frame of the sequence or,
        half of the time, any frame up to the window's first.
        """
        windows = draw(generator, batch, len(self), self._weights)
        ends = self._places.rows(windows, self._until, self._least)
        first = self._places.base[self._places.owner(ends)]
        begin = torch.maximum(ends - self.frames + 1, first)
        any_of_them, place = torch.rand(2, batch, generator=generator)
        offset = (any_of_them < 0.5) * place * (begin - first + 1)
        return self._batch(windows, first + offset.long())

    def transitions(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """B steps between consecutive frames without their pictures, drawn uniformly.

        Returns proprio, next_proprio, previous_proprio [B, P], and action, previous_action
        [B, C, A]: the chunk from the frame and the one that led there (see `batch`).
        """
        drawn = draw(generator, batch, int(self._reached[-1]), None)
        after = self._places.rows(drawn, self._reached, 1)
        reached = after.to(self.images.device)
        return _sent(
            {
                "proprio": self.proprio[reached - 1],
                "action": self.actions[reached],
                "next_proprio": self.proprio[reached],
                **self._before(after - 1),
            },
            self.device,
        )

    def _before(self, rows: Tensor) -> dict[str, Tensor]:
        """What was before frames [B]: at a sequence's first the frame itself, and zeros."""
        device = self.images.device
        earlier = torch.maximum(rows - 1, self._places.base[self._places.owner(rows)])
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
        return self._batch(windows, None)

    def _batch(self, windows: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """A batch, with frames `reference` [B] besides."""
        ends = self._places.rows(windows, self._until, self._least)
        rows = ends[:, None] + torch.arange(1 - self.frames, 1)
        owner = self._places.owner(ends)
        first = self._places.base[owner][:, None]
        valid = rows >= first
        rows = torch.maximum(rows, first)
        device = self.images.device
        index, inside = rows.to(device), valid.to(device)
        led = inside.clone()
        led[:, 0] = False
        flat = rows.flatten() if reference is None else torch.cat([rows.flatten(), reference])
        frames = taken(self.images, flat.to(device))  # at once
        pictures = {"image": frames[: rows.numel()].unflatten(0, rows.shape)}
        if reference is not None:
            pictures["reference"] = frames[rows.numel() :]
        return _sent(
            {
                **pictures,
                "proprio": self.proprio[index],
                "action": self.actions[index] * led[..., None, None],
                **self._before(rows[:, 0]),
                "valid": inside,
                "success": self.success[index],
                "steps": self.steps[index],
                "task": self._task[owner],
                "episode": self._episode[owner],
            },
            self.device,
        )


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
        beside = folder_of(e.images for e in episodes)
        proprio, actions = Column(beside), Column(beside)
        for e, r in zip(episodes, rows, strict=True):
            proprio.add(torch.from_numpy(e.proprio[r]))
            actions.add(torch.from_numpy(padded_chunks(e.actions, e.frame_steps[r], chunk)))
        self.proprio, self.actions = proprio.whole(), actions.whole()
        images = (_rows(e.images, r) for e, r in zip(episodes, rows, strict=True))
        self.images = Table(images, beside) if beside else torch.cat(list(images))
        self.on_disk, self.device = beside is not None, self.images.device
        owned = torch.tensor([len(r) for r in rows])
        self._places = _Places(owned)
        self._task = torch.tensor([e.task for e in episodes])
        self._weights = _running(weights, owned)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.actions)

    def to(self, device: torch.device | str) -> ActionWindows:
        """Give batches on a device, and move there what is in memory; indices are still drawn on
        the CPU. Returns self."""
        self.device = torch.device(device)
        if not self.on_disk:
            for name in ("images", "proprio", "actions"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def sample(self, generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        """A batch of B samples drawn with replacement by a CPU generator; see `batch`."""
        return self.batch(draw(generator, batch, len(self), self._weights))

    def batch(self, samples: Tensor) -> dict[str, Tensor]:
        """Samples by index [B]: image [B, V, H, W, 3] uint8, proprio [B, P], action [B, C, A], task
        [B].
        """
        index = samples.to(self.images.device)
        batch = {
            "image": taken(self.images, index),
            "proprio": self.proprio[index],
            "action": self.actions[index],
            "task": self._task[self._places.owner(samples)],
        }
        return _sent(batch, self.device)


def _rows(images: np.ndarray | Frames, rows: np.ndarray) -> Tensor | Rows:
    on_disk = isinstance(images, Frames)
    return Rows(images, rows) if on_disk else torch.from_numpy(np.ascontiguousarray(images[rows]))
