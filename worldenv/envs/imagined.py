"""The imagined benchmark: the learned world behind the same VectorEnv interface as the real one.

Rows begin in contexts taken from real episodes (their first frame, or two frames from their
middle), a world model generates one frame per chunk of actions, a reward model gives reward and
termination: any that keep the two protocols below, docs/adding-a-simulator.md, adding-a-judge.md.
Finished rows freeze until `reset_mask` refills them. Everything but the flags the host
needs to refill rows stays on the world model's device; noise is seeded per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from worldenv.data.disk import Unread
from worldenv.data.windows import FrameSequence, from_first_step
from worldenv.envs.start import Start
from worldenv.runtime import parallel
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import numpy_generator

_LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-,.'"


class WorldModel(Protocol):
    """B worlds at once, frame by frame, ready to generate (`models.simulator.Simulator` is one)."""

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""

    def start(self, batch: int) -> Any:
        """B empty worlds, in whatever form the model keeps them."""

    def prefill(
        self,
        state: Any,
        rows: np.ndarray,  # bool [B], host
        image: Tensor,  # [n, K, V, H, W, 3] uint8, K real frames of the n chosen rows
        proprio: Tensor,  # [n, K, P]
        action: Tensor,  # [n, K, C, A]; action[:, f] led to frame f, zeros for the first
        seeds: Tensor,  # [n] int64, all that a row's randomness may depend on
    ) -> None:
        """Begin new worlds in `rows`, the others untouched."""

    def step(
        self, state: Any, action: Tensor, steps: int, active: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Image `[B, V, H, W, 3]` uint8 and proprio `[B, P]` after a chunk `[B, C, A]`, in `steps`
        passes of sampling; rows that are not active (bool [B], host) keep theirs."""


class Onlooker(Protocol):
    """B episodes watched at once (`models.reflector.Judge` is one)."""

    def reset(self, rows: Tensor) -> None:
        """Forget what rows (bool [B]) have seen."""

    def watch(
        self, image: Tensor, proprio: Tensor, instruction: Sequence[str], rows: Tensor
    ) -> Tensor:
        """Reward `[B]` in [0, 1] after one more frame; rows (bool [B]): those that have one."""


class RewardModel(Protocol):
    """Says how near to success an episode is (`models.reflector.Reflector` is one)."""

    threshold: Any
    """Reward above which an episode has succeeded, and ends; a number, also as a tensor."""

    def onlooker(self, batch: int) -> Onlooker:
        """One that watches B episodes from their beginnings."""


@dataclass(frozen=True)
class Context:
    """Where an imagined episode begins: K real frames and the chunks between them."""

    image: Tensor = Unread()  # noqa: RUF009 - a descriptor; [K, V, H, W, 3] uint8
    proprio: Tensor  # [K, P]
    action: Tensor  # [K, C, A]; action[f] led to frame f, zeros for the first
    task: int
    instruction: str
    elapsed: int  # chunks executed before the last context frame
    won: bool  # whether the real episode succeeded


def first_frames(sequences: Sequence[FrameSequence]) -> list[Context]:
    """One context per sequence that begins at step 0."""
    return [_context(s, 0, 1) for s in from_first_step(sequences)]


def middle_frames(sequences: Sequence[FrameSequence], chunk: int) -> list[Context]:
    """Contexts of two frames from every place before success, first and last frames left out."""
    return [
        _context(s, t, 2, int(s.steps[t]) // chunk)
        for s in sequences
        for t in range(1, len(s) - 1)
        if not bool(s.success[t])
    ]


def _context(sequence: FrameSequence, t: int, frames: int, elapsed: int = 0) -> Context:
    rows = slice(t - frames + 1, t + 1)
    action = torch.zeros(frames, *sequence.actions.shape[1:])
    action[1:] = sequence.actions[t - frames + 1 : t]
    return Context(
        sequence.unread[rows],
        sequence.proprio[rows],
        action,
        sequence.task,
        sequence.instruction,
        elapsed,
        bool(sequence.success.any()),
    )


def imagined_envs(
    simulator: WorldModel,
    reflector: RewardModel,
    contexts: Sequence[Context],
    rows: int,
    **arguments: Any,
) -> list["ImaginedVectorEnv"]:
    """`rows` rows as environments for `rl.rollout.rollout_shards`: one on a GPU, which wants large
    batches, else several that threads can share. arguments: `ImaginedVectorEnv`'s.
    """
    return [
        ImaginedVectorEnv(simulator, reflector, contexts, part.stop - part.start, **arguments)
        for part in parallel.shares(rows, parallel.shards(simulator.device))
    ]


class ImaginedVectorEnv(VectorEnv):
    """B imagined episodes. Observations and actions as the real benchmark has them, as tensors.

    Reward: R in [0, 1] after each frame (0 for finished rows). terminated: R > the reflector's eta;
    truncated: the episode has `max_chunks` chunks, those before its context included.

    false_stops: share of the episodes whose start has a seed for `mistakes` in which the reflector
    errs once, after a chunk drawn evenly from those that are left: it says success, and the episode
    ends as any other success does. R is then what such a word implies and no more, the middle of
    (eta, 1]; where R was above eta there is nothing to err about. An episode that ends before its
    chunk comes is spared, so that of short ones fewer are stopped. To learn what mistakes cost.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(
        self,
        simulator: WorldModel,
        reflector: RewardModel,
        contexts: Sequence[Context],
        num_envs: int,
        *,
        max_chunks: int,
        sampling_steps: int,
        terminate: bool = True,
        false_stops: float = 0.0,
    ) -> None:
        if not contexts:
            raise UserError("an imagined environment needs at least one context; collect episodes")
        self.simulator, self.reflector = simulator, reflector
        self.contexts, self.num_envs = list(contexts), num_envs
        self.max_chunks, self.sampling_steps = max_chunks, sampling_steps
        self.threshold, self.terminate = float(reflector.threshold), terminate
        self.false_stops = false_stops
        frame, proprio = contexts[0].image, contexts[0].proprio
        self.single_observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, tuple(frame.shape[1:]), np.uint8),
                "proprio": spaces.Box(-np.inf, np.inf, tuple(proprio.shape[1:]), np.float32),
                "instruction": spaces.Text(max_length=200, charset=_LETTERS),
            }
        )
        chunk = tuple(contexts[0].action.shape[1:])
        self.single_action_space = spaces.Box(-1.0, 1.0, chunk, np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.device = simulator.device
        self._state = self.simulator.start(num_envs)
        self._judge = reflector.onlooker(num_envs)
        self._instructions = [""] * num_envs
        self._chunks = np.zeros(num_envs, np.int64)
        self._mistake = np.zeros(num_envs, np.int64)  # chunk after which the reflector errs
        self._steps = np.zeros(num_envs, np.int64)
        self._success_step = np.full(num_envs, -1)
        self._terminated = np.ones(num_envs, bool)  # rows are idle until their first reset
        self._truncated = np.zeros(num_envs, bool)
        shape = (num_envs, *frame.shape[1:])
        self._image = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self._proprio = torch.zeros(num_envs, *proprio.shape[1:], device=self.device)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin new episodes in the rows of options["reset_mask"] (default all).

        options["starts"]: B entries; `Start.index` is the context, `Start.seed` seeds the noise.
        Without starts, contexts and noise are drawn from `seed`.
        """
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)))
        starts = options.get("starts")
        if starts is None:
            if seed is not None or self._np_random is None:
                super().reset(seed=seed)
            draw = self.np_random.integers
            starts = [
                Start(0, int(draw(len(self.contexts))), int(draw(2**31)))
                for _ in range(self.num_envs)
            ]
        chosen = {int(i): starts[i] for i in np.flatnonzero(mask)}
        for i, start in chosen.items():
            if start is None or start.index is None or not 0 <= start.index < len(self.contexts):
                raise UserError(
                    f"row {i}: expected a start with a context index in "
                    f"0..{len(self.contexts) - 1}, got {start}"
                )
        by_length: dict[int, dict[int, Start]] = {}
        for i, start in chosen.items():
            by_length.setdefault(len(self.contexts[start.index].image), {})[i] = start
        for rows in by_length.values():
            self._prefill(rows)
        self._terminated[mask] = self._truncated[mask] = False
        self._success_step[mask], self._steps[mask] = -1, 0
        return self._observation(), self._info()

    def _prefill(self, rows: dict[int, Start]) -> None:
        """Fill rows whose contexts are equally long."""
        mask = np.zeros(self.num_envs, bool)
        mask[list(rows)] = True
        order = sorted(rows)
        contexts = [self.contexts[rows[i].index] for i in order]
        image, proprio, action = (
            torch.stack([getattr(c, name) for c in contexts]).to(self.device)
            for name in ("image", "proprio", "action")
        )
        seeds = torch.tensor([rows[i].seed for i in order], device=self.device)
        self.simulator.prefill(self._state, mask, image, proprio, action, seeds)
        index = torch.tensor(order, device=self.device)
        self._image[index], self._proprio[index] = image[:, -1], proprio[:, -1]
        for i, context in zip(order, contexts, strict=True):
            self._instructions[i], self._chunks[i] = context.instruction, context.elapsed
            self._mistake[i] = self._draw_mistake(rows[i].mistakes, context.elapsed)
        flags = torch.as_tensor(mask)
        self._judge.reset(flags)
        self._judge.watch(self._image, self._proprio, self._instructions, flags)

    def _draw_mistake(self, seed: int | None, elapsed: int) -> int:
        """Number of the chunk after which the reflector errs, 0 for none: by the seed alone."""
        if not self.false_stops or seed is None:
            return 0
        errs, place = numpy_generator(seed).random(2)
        if errs >= self.false_stops:
            return 0
        return elapsed + 1 + int(place * (self.max_chunks - elapsed))

    def step(
        self, actions: Tensor
    ) -> tuple[dict[str, Any], Tensor, Tensor, Tensor, dict[str, Any]]:
        """One chunk `[B, C, A]` in every live row."""
        live = ~(self._terminated | self._truncated)
        actions = torch.as_tensor(actions, device=self.device)
        if tuple(actions.shape) != self.action_space.shape:
            raise UserError(
                f"actions: expected shape {self.action_space.shape}, got {tuple(actions.shape)}"
            )
        passes = self.sampling_steps
        self._image, self._proprio = self.simulator.step(self._state, actions, passes, live)
        rows = torch.as_tensor(live)
        reward = self._judge.watch(self._image, self._proprio, self._instructions, rows)
        reward = reward * rows.to(self.device)
        self._chunks += live
        self._steps += live * actions.shape[1]
        mistaken = live & (self._chunks == self._mistake)
        if mistaken.any():
            below = torch.as_tensor(mistaken).to(self.device) & (reward <= self.threshold)
            reward = torch.where(below, (1 + self.threshold) / 2, reward)
        # The one read-back per chunk: the host decides which rows to refill.
        success = (reward > self.threshold).cpu().numpy() & live
        first = success & (self._success_step < 0)
        self._success_step[first] = self._steps[first]
        if self.terminate:
            self._terminated |= success
        self._truncated |= live & ~self._terminated & (self._chunks >= self.max_chunks)
        flags = (torch.as_tensor(f.copy()) for f in (self._terminated, self._truncated))
        return self._observation(), reward, *flags, self._info()

    def _observation(self) -> dict[str, Any]:
        return {
            "image": self._image,
            "proprio": self._proprio,
            "instruction": tuple(self._instructions),
        }

    def _info(self) -> dict[str, Any]:
        return {
            "success": self._success_step > 0,
            "steps": self._steps.copy(),
            "success_step": self._success_step.copy(),
        }
