"""Imitation of the demonstrations: L1 on the chunk, a Laplace likelihood for the scale head.

OpenVLA-OFT's objective, plus World-Env's scale head trained on detached means; of tokens, as
OpenVLA's, their cross-entropy.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from worldenv.data.windows import ActionWindows
from worldenv.rl.loss import imitation_loss
from worldenv.rl.policy import Policy, parameter_groups
from worldenv.runtime import sharding
from worldenv.runtime.seeds import derive
from worldenv.stages import store, training
from worldenv.stages.collect import recorded, statistics
from worldenv.stages.run import Run, Stage


def imitate(
    run: Run, mark: str, *, ema: bool = False, schedule: Callable = training.learning_rate
) -> tuple[Policy, dict]:
    """A policy trained on the run's demonstrations, and the metrics of the last steps."""
    config, sft = run.config, run.config.sft
    episodes = recorded(run, "demonstrations")
    windows = ActionWindows(episodes, config.env.chunk).to(run.device)
    torch.manual_seed(derive(config.seed, "sft weights"))
    policy: Policy = store.build("policy", config)
    policy.set_statistics(*statistics(episodes))
    policy = sharding.shard(policy.to(run.device), "policy" in config.fsdp)
    noise = torch.tensor([e.noise for e in run.embodiment.proprio], device=run.device)

    pieces = training.pieces(run, sft.batch, sft.micro_batch)

    batches = training.Batches(windows, sft.batch // pieces, sft.steps, config.seed, "sft")

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        g, batch = batches(step, shard)
        batch["instruction"] = [windows.instructions[t] for t in batch["task"].tolist()]
        mu, log_scale = policy.augmented(batch, g, sft.shift, noise)
        return imitation_loss(mu, log_scale, policy.normalise(batch["action"]), sft.scale_weight)

    tail = training.train(
        run,
        "sft",
        mark,
        policy,
        loss_at,
        steps=sft.steps,
        lr=sft.lr,
        betas=(0.9, 0.999),
        groups=parameter_groups(policy, sft.lr, sft.head_lr),
        pieces=pieces,
        frozen=store.holds_all("policy"),
        ema=ema,
        schedule=schedule,
    )
    return sharding.gathered(policy), {"samples": len(windows), **tail}


def run(run: Run, mark: str) -> dict:
    """Stage `sft`: writes checkpoints/policy-sft.safetensors."""
    policy, figures = imitate(run, mark)
    path = run.path("checkpoints", "policy-sft.safetensors")
    store.save("policy", policy, path)
    store.export(policy, path.with_suffix(""))
    training.finish(run, "sft")
    return figures


STAGE = Stage(
    "sft",
    lambda run_, mark, number: run(run_, mark),
    settings=lambda config, number: (config.sft, config.policy, *store.digests(config.policy)),
    needs=lambda config, number: ("demonstrations",),
    makes=("checkpoints/policy-sft.safetensors", "checkpoints/policy-sft"),
    rounds=False,
)
