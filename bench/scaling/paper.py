"""What the 7B policy and the 5B world would take of GPUs, from their costs on `meta`: on paper.

The preset is `openvla-oft-wan` with Wan 2.2 TI2V 5B in place of Wan 2.1 1.3B, at its own batches.
FLOPs are those that `worldenv-train --plan` counts, recomputed activations among them. A policy
that is trained in full is taken to cost 4/3 of its adapters: per weight and token two operations
forward, two again, two for activations' gradients and two more for its own.
"""

from dataclasses import asdict, replace
from typing import Any

from bench.__main__ import RESULTS
from bench.scaling.model import PAPER, Kind
from worldenv.config import Config
from worldenv.models.published_sizes import OPENVLA, WAN_2_2_5B
from worldenv.presets import MODELS, preset
from worldenv.runtime.revision import commit
from worldenv.stages.estimate import IMAGINED
from worldenv.stages.plan_costs import Costs

FILE = RESULTS / PAPER


def config() -> Config:
    """The 7B policy in the 5B world."""
    base, wan = preset("openvla-oft-wan"), MODELS / "Wan2.2-TI2V-5B-Diffusers"
    world = replace(base.simulator, folder=wan, tokenizer_folder=wan, patch=32)
    return replace(base, simulator=world)


def costs() -> dict[str, Any]:
    """The commit, the models' names and every `Kind`. Takes minutes, and no memory to speak of."""
    of = config()
    rl, found = of.posttrain, Costs(of, widened=False)
    decisions = int(rl.contexts * rl.group * IMAGINED * of.max_chunks)
    decided = found.act(1).flops + found.judge(1).flops
    decided += found.worlds(1, rl.sampling_steps).frame.flops
    update = rl.minibatch * found.improve(1).flops
    world = of.simulator.batch * found.denoise(1, 1).flops
    judge = of.reflector.batch * found.learn(1).flops
    policy, simulator = found.policy, found.simulator
    kinds = [
        Kind("policy, adapters", "replicated", update, rl.minibatch, policy.trained),
        Kind(
            "policy in full, sharded",
            "sharded",
            4 / 3 * update,
            rl.minibatch,
            policy.parameters,
            OPENVLA.layers,
            rl.micro_batch,
        ),
        Kind(
            "world in full, replicated", "replicated", world, of.simulator.batch, simulator.trained
        ),
        Kind(
            "world in full, sharded",
            "sharded",
            world,
            of.simulator.batch,
            simulator.trained,
            WAN_2_2_5B.layers,
        ),
        Kind(
            "reflector's head",
            "replicated",
            judge,
            of.reflector.batch,
            found.reflector.trained,
        ),
        Kind(
            "rollout",
            "gathered",
            decisions * decided,
            rl.contexts * rl.group,
            size=decisions * found.decision_bytes,
        ),
    ]
    held = {"policy": policy, "simulator": simulator, "reflector": found.reflector}
    models = {name: of.source.partition(" as published")[0] for name, of in held.items()}
    return {"commit": commit(), "models": models, "kinds": [asdict(kind) for kind in kinds]}
