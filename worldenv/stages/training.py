"""The training loop that imitation, simulator and reflector share.

A step's batch is cut into shards, each drawn from a generator named by (seed, stage, step, shard)
and computed on one thread (`runtime.parallel`). So a run killed and resumed from its last
checkpoint does exactly what an uninterrupted one would (on a CPU, bit for bit), whatever cores
either had.
"""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from worldenv.data.episode import Episode
from worldenv.data.windows import ActionWindows, FrameWindows
from worldenv.runtime import checkpoint, parallel, progress, ranks, sharding, signals
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import check_finite
from worldenv.runtime.partial import Partial
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import store
from worldenv.stages.collect import statistics
from worldenv.stages.run import Run

# (step, shard) to the loss of a shard's samples and what to log.
Loss = Callable[[int, int], tuple[Tensor, dict[str, Tensor]]]
CHECKPOINT_SECONDS = 60.0


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05) -> float:
    """Linear warm-up, then a cosine down to zero; of the step alone, so no checkpoint holds it."""
    done = (step + 1) / steps
    if done < warmup:
        return peak * done / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def shard_size(run: Run, batch: int) -> int:
    """Samples in each shard of a batch."""
    return batch // parallel.shards(run.device)


def pieces(run: Run, batch: int, most: int = 0) -> int:
    """How many losses make up a batch: one for each shard, or more, of at most `most` samples."""
    return max(parallel.shards(run.device), batch // most if most else 0)


class Batches:
    """What `windows.sample` gives of a stage's steps and shards, with the generator that drew it,
    which goes on from there. Frames on the disk are read a step ahead, on a thread of their own:
    the device does not wait for them."""

    def __init__(
        self, windows: FrameWindows | ActionWindows, size: int, steps: int, *key: int | str
    ) -> None:
        """size: of a shard; key: of the stage's generators, before step and shard."""
        self._windows, self._size, self._steps, self._key = windows, size, steps, key
        self._reader: ThreadPoolExecutor | None = None
        if windows.on_disk:
            self._reader = ThreadPoolExecutor(1, "reader", torch.set_num_threads, (1,))
        self._ahead: dict[tuple[int, int], Future] = {}

    def __call__(self, step: int, shard: int) -> tuple[torch.Generator, dict[str, Tensor]]:
        """The generator and the batch of a shard."""
        found = self._ahead.pop((step, shard), None)
        if self._reader and step + 1 < self._steps:
            self._ahead[step + 1, shard] = self._reader.submit(self._draw, step + 1, shard)
        return found.result() if found else self._draw(step, shard)

    def _draw(self, step: int, shard: int) -> tuple[torch.Generator, dict[str, Tensor]]:
        g = generator(*self._key, step, shard)
        return g, self._windows.sample(g, self._size)


def begin(run: Run, kind: str, number: int, episodes: list[Episode]) -> nn.Module:
    """What round `number` trains (kind: simulator, reflector): the round before's, or a new one
    that knows the proprio statistics of `episodes`.
    """
    luck = (run.config.simulator.luck,) if run.config.simulator.luck else ()
    torch.manual_seed(derive(run.config.seed, f"{kind} weights", *luck))
    if number:
        previous = run.path("checkpoints", f"{kind}-{number - 1}.safetensors")
        return store.load(kind, previous, run.device)
    module = store.build(kind, run.config)
    module.set_statistics(*statistics(episodes))
    return module.to(run.device)


def train(
    run: Run,
    name: str,
    mark: str,
    module: nn.Module,
    loss_at: Loss,
    *,
    steps: int,
    lr: float,
    schedule: Callable[[int, int, float], float] = learning_rate,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.98),
    ema: bool = False,
    groups: list[dict] | None = None,
    pieces: int | None = None,
    frozen: bool = True,
    log_every: int = 20,
) -> dict[str, float]:
    """Minimise the mean of `loss_at(step, shard)` over the shards of a batch; the module ends up
    trained.

    schedule: (step, steps, peak) to a learning rate.
    groups: of parameters with a peak learning rate each (default: all of them, at lr). pieces: how
    many losses a batch has, if not one for each shard. frozen: whether checkpoints hold parameters
    that are not trained. ema: end with the exponential moving average of the weights. Returns the
    metrics averaged over the last tenth of the steps. NonFiniteError (with step and name) if the
    loss or its gradient is NaN on any rank; the last checkpoint stays.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    count = pieces or parallel.shards(run.device)
    optimizer = torch.optim.AdamW(
        groups or parameters, lr, betas=betas, weight_decay=weight_decay, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = {k: v.clone() for k, v in module.state_dict().items()} if ema else {}
    partial = partial_of(run, name)
    begin, tail = _resume(partial, mark, module, optimizer, average, frozen)
    run.logger.rewind(name, begin)
    saved = time.monotonic()
    done = begin

    def save() -> None:
        tensors = checkpoint.training_tensors(module, optimizer, frozen)
        tensors |= checkpoint.prefixed("ema/", average)
        partial.save(tensors, {"mark": mark, "step": done, "tail": tail})

    module.train()
    with progress.bar(steps, name) as bar, signals.between_steps() as stopping:
        bar.update(begin)
        for step in range(begin, steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = schedule(step, steps, peak)
            losses = [functools.partial(loss_at, step, shard) for shard in range(count)]
            loss, logged, norm = sharding.gradients(module, parameters, losses, max_norm=1.0)
            # Of all ranks, and the same on each: they stop together, before the step is taken.
            check_finite(f"{name} loss", loss, step)
            check_finite(f"{name} gradient", norm, step)
            optimizer.step()
            _track_average(average, module, step)
            done = step + 1
            if step >= 0.9 * steps:
                for key, value in _mean(logged).items():
                    total, seen = tail.get(key, (0.0, 0))
                    tail[key] = (total + value, seen + 1)
            if step % log_every == 0 or done == steps:
                numbers = _mean(logged)
                run.logger.log(name, step, lr=optimizer.param_groups[0]["lr"], **numbers)
                bar.update(done, **numbers)
            elif done % 5 == 0:
                bar.update(done)
            told = ranks.gather((time.monotonic() - saved > CHECKPOINT_SECONDS, stopping))
            late = told[0][0]  # by rank 0's clock: of a sharded model all save, or none
            asked = [number for _, own in told for number in own]
            if asked or late or done == steps:  # what comes after the last may fail
                save()
                saved = time.monotonic()
            if asked:
                partial.wait()
                raise signals.Stopped(asked[0])
    partial.wait()
    if ema:
        module.load_state_dict(average)
    module.eval()
    return {key: total / seen for key, (total, seen) in tail.items()}


def _mean(logged: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of a batch from those of its shards."""
    return {key: sum(float(part[key]) for part in logged) / len(logged) for key in logged[0]}


def _resume(
    partial: Partial,
    mark: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict,
    frozen: bool,
) -> tuple[int, dict]:
    """Continue from a partial checkpoint of the same stage and configuration, if there is one."""
    own, path = dict(module.state_dict()), partial.path
    found = partial.resume(mark, {"step": int, "tail": dict}, own)
    if found is None:
        return 0, {}
    tensors, metadata = found
    saved = checkpoint.selected("ema/", tensors)
    training = {k: v for k, v in tensors.items() if not k.startswith("ema/")}
    try:
        checkpoint.check_fit(average, saved, path, "moving average")
        checkpoint.load_training(module, optimizer, training, path, frozen)
    except UserError as error:
        print(f"nothing to go on from, so the stage begins anew: {error}")
        return 0, {}
    average.update(saved)
    return metadata["step"], metadata["tail"]


@torch.no_grad()
def _track_average(average: dict[str, Tensor], module: nn.Module, step: int) -> None:
    """Moving average with a horizon that grows to 200 steps, by name as checkpoints hold it."""
    if not average:
        return
    weight = 1 - min(0.995, (step + 1) / (step + 20))
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, weight)
        else:
            average[name].copy_(value)


def finish(run: Run, name: str) -> None:
    """Remove a stage's partial checkpoint once its artifact is written."""
    partial_of(run, name).remove()


def partial_of(run: Run, name: str) -> Partial:
    """A stage's partial checkpoint."""
    return Partial(run.path("checkpoints", f"{name}.partial.safetensors"))
