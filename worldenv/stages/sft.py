"""Imitation of the demonstrations: L1 on the chunk, a Laplace likelihood for the scale head.

OpenVLA-OFT's objective, plus World-Env's scale head trained on detached means, so that the spread
never trades against accuracy.
"""

import torch
from torch import Tensor

from worldenv.data.windows import ActionWindows
from worldenv.models.layers import views_to_channels
from worldenv.models.policy import augment
from worldenv.ops import action_logprob
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import store, training
from worldenv.stages.collect import recorded, statistics
from worldenv.stages.run import Run, Stage


def run(run: Run, mark: str) -> dict:
    """Stage `sft`: writes checkpoints/policy-sft.safetensors."""
    config, sft = run.config, run.config.sft
    episodes = recorded(run, "demonstrations")
    windows = ActionWindows(episodes, config.env.chunk).to(run.device)
    torch.manual_seed(derive(config.seed, "sft weights"))
    policy = store.build("policy", config)
    policy.set_statistics(*statistics(episodes))
    policy.to(run.device)
    noise = torch.tensor([e.noise for e in run.embodiment.proprio], device=run.device)

    size = training.shard_size(run, sft.batch)

    def loss_at(step: int, shard: int) -> tuple[Tensor, dict[str, Tensor]]:
        g = generator(config.seed, "sft", step, shard)
        batch = windows.sample(g, size)
        views = augment(views_to_channels(batch["image"]), sft.shift, g)
        jitter = torch.randn(size, len(noise), generator=g).to(run.device) * noise
        words = policy.words([windows.instructions[t] for t in batch["task"].tolist()])
        mu, log_scale = policy.decode(views, batch["proprio"] + jitter, words)
        l1 = (mu - batch["action"]).abs().mean()
        likelihood = action_logprob(mu.detach(), log_scale, batch["action"]).mean()
        likelihood = likelihood / mu.shape[-1]
        loss = l1 - sft.scale_weight * likelihood
        return loss, {
            "loss": loss.detach(),
            "l1": l1.detach(),
            "scale": log_scale.detach().exp().mean(),
        }

    tail = training.train(
        run,
        "sft",
        mark,
        policy,
        loss_at,
        steps=sft.steps,
        lr=sft.lr,
        betas=(0.9, 0.999),
    )
    path = run.path("checkpoints", "policy-sft.safetensors")
    store.save("policy", policy, path)
    training.finish(run, "sft")
    return {"samples": len(windows), **tail}


STAGE = Stage(
    "sft",
    lambda run_, mark, number: run(run_, mark),
    settings=lambda config, number: (config.sft, config.policy),
    needs=lambda config, number: ("demonstrations",),
    makes=("checkpoints/policy-sft.safetensors",),
    rounds=False,
)
