"""PPO inside the learned world (World-Env section 3.5): the policy learns nothing in the real one.

Each iteration draws contexts, rolls out G imagined episodes from each (without a critic, until
enough of them can teach), and makes one guarded update. Imagined success goes on rising where real
success falls: with `real_check_every` the policy is now and then checked in the real benchmark, on
tuning starts, and a round keeps the one that did best there. The checks train nothing.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from worldenv.config import Config, PosttrainConfig
from worldenv.data.windows import chunk_sequences
from worldenv.envs.imagined import (
    Context,
    ImaginedVectorEnv,
    first_frames,
    imagined_envs,
    middle_frames,
)
from worldenv.envs.start import Start
from worldenv.models.policy import Policy, ValueHead
from worldenv.rl.loss import episode_rewards, group_advantages
from worldenv.rl.noise import exploration
from worldenv.rl.policy import parameter_groups, twin
from worldenv.rl.rollout import Trajectories, join, rollout_shards
from worldenv.rl.update import Learner, update
from worldenv.runtime import checkpoint, progress, ranks, sharding
from worldenv.runtime import device as devices
from worldenv.runtime.errors import UserError
from worldenv.runtime.partial import Partial
from worldenv.runtime.seeds import derive, generator
from worldenv.stages import collect, gate, physics, store, training
from worldenv.stages.collect import load_round
from worldenv.stages.evaluate import evaluate_policy
from worldenv.stages.run import Run, Stage, data_up_to, stage_before, world_of


def run(run: Run, mark: str, number: int) -> dict:
    """Writes checkpoints/policy-N.safetensors."""
    config, rl = run.config, run.config.posttrain
    checkpoints = run.path("checkpoints")
    start = checkpoints / f"{starting_policy(rl, number)}.safetensors"
    policy: Policy = store.load("policy", start, run.device)
    policy = sharding.shard(policy, "policy" in config.fsdp)
    learner = new_learner(run, policy, number)
    envs, firsts, middles = make_world(run, number) if config.learned else ([], [], [])
    iterations = rl.refresh_iterations if number else rl.iterations
    name = f"posttrain-{number}"
    partial = training.partial_of(run, name)
    # The best policy so far takes its place when the stage ends, not before.
    best = run.path("checkpoints", f"{name}.best.safetensors")
    begin, totals = _resume(partial, mark, learner, best)
    devices.give_back()  # the episodes, of which contexts are copies
    run.logger.rewind(name, begin)
    run.logger.rewind(f"check-{number}", begin)

    def check(step: int) -> None:
        known = None if step else _known_success(run, number)
        with sharding.whole(policy) as acting:
            real = _check_reality(run, acting, envs, firsts, number, step, known)
        if known is None:
            totals["check_episodes"] += rl.real_check_episodes * len(config.env.tasks)
        if not rl.keep_best or totals["kept_success"] is None or real > totals["kept_success"]:
            totals.update(kept_iteration=step, kept_success=real)
            _keep(policy, best)

    with progress.bar(iterations, name) as bar:
        bar.update(begin)
        for step in range(begin, iterations):
            if rl.real_check_every and step % rl.real_check_every == 0:
                check(step)
            begun = time.perf_counter()
            with sharding.whole(policy) as acting:
                actor = replace(learner, policy=acting)
                episodes = _imagine(run, actor, envs, firsts, middles, number, step)
            seconds = time.perf_counter() - begun
            devices.give_back()  # frames and pieces of the rollout: an update needs other sizes
            metrics = update(learner, episodes, derive(config.seed, "update", number), step)
            success = _count(config, episodes, seconds, metrics, totals)
            run.logger.log(name, step, **metrics)
            bar.update(
                step + 1,
                **{success: metrics[success]},
                clip=metrics.get("clip_fraction", 0.0),
            )
            if rl.snapshot_every and (step + 1) % rl.snapshot_every == 0:
                _keep(policy, run.path(*snapshots(number), f"{step + 1}.safetensors"))
            _save(partial, mark, learner, step + 1, totals)
    if rl.real_check_every:
        check(iterations)
    else:
        _keep(policy, best)
    policy = sharding.gathered(policy)
    path = checkpoints / f"policy-{number}.safetensors"

    def keep() -> None:
        if policy.config.kind != "small":  # what was best, where the policy has gone on
            kept, *_ = store.read("policy", best, run.device)
            checkpoint.load_module(policy, kept, best, store.holds_all("policy"))
            store.export(policy, path.with_suffix(""))
        os.replace(best, path)

    ranks.together(keep)
    partial.remove()
    return {"contexts": len(firsts), "middle_contexts": len(middles), **totals}


def _count(
    config: Config, episodes: Trajectories, seconds: float, metrics: dict, totals: dict
) -> str:
    """Add an iteration to totals, and its rate to metrics; what its success is called in these."""
    if not config.learned:
        totals["rl_episodes"] += len(episodes.length)
        metrics["real_success"] = metrics.pop("imagined_success")
        return "real_success"
    frames = len(episodes.episode)
    totals["frames"] += frames
    totals["imagination_seconds"] += seconds
    metrics["frames_per_second"] = frames / seconds
    return "imagined_success"


def at_the_gate(run_: Run, mark: str, number: int) -> dict:
    """Stage `posttrain-N`: `run`, if the round's world is fit for it. UserError if not."""
    passed = {"gate": gate.check(run_, number)} if run_.config.learned else {}
    return {**passed, **run(run_, mark, number)}


STAGE = Stage(
    "posttrain",
    at_the_gate,
    # One round more continues a finished run: how many there are changes none of them.
    settings=lambda config, n: (
        replace(config.posttrain, rounds=1),
        *(() if config.learned else (collect.world(config), config.collect.fresh)),
    ),
    needs=lambda config, n: (
        "sft",
        stage_before(n),
        *((*data_up_to(n), world_of(config, n)) if config.learned else ()),
        *((f"reflector-{n}", f"fidelity-{n}") if config.learned else ()),
    ),
    makes=(
        "checkpoints/policy-{n}.safetensors",
        "checkpoints/policy-{n}",
        "checkpoints/iterations-{n}",
    ),
    logs=lambda name, n: (name, f"check-{n}"),
)


def starting_policy(rl: PosttrainConfig, number: int) -> str:
    """Name of the checkpoint that round `number` post-trains."""
    return "policy-sft" if rl.restart or number == 0 else f"policy-{number - 1}"


def snapshots(number: int) -> tuple[str, str]:
    """Folder of a round's policies by iteration, relative to the run's."""
    return "checkpoints", f"iterations-{number}"


def make_world(run: Run, number: int) -> tuple[list[ImaginedVectorEnv], list[int], list[int]]:
    """The imagined environments of a round, with the indices of its first-frame and its
    middle-of-episode contexts; of the tasks alone of which its world is right.
    """
    config, robot = run.config, run.embodiment
    demonstrations, explored, _ = load_round(run, number, gate.tasks(run, number))
    own = chunk_sequences(explored, config.env.chunk)
    shown = chunk_sequences(demonstrations, config.env.chunk)
    firsts: list[Context] = [*first_frames(shown), *first_frames(own)]
    middles = [
        c
        for c in middle_frames(own, config.env.chunk)
        if robot.opening(c.proprio[-1].tolist()) > robot.gripper_open
        and config.posttrain.middle_from <= c.elapsed < config.max_chunks - 2
    ]
    every = []
    for checkpoints in (
        run.path("checkpoints"),
        *(Path(f) / "checkpoints" for f in config.posttrain.beside),
    ):
        world = checkpoints / f"{world_of(config, number)}.safetensors"
        simulator = store.load("simulator", world, run.device)
        every.append(
            imagined_envs(
                simulator.for_generation(),
                store.load(
                    "reflector", checkpoints / f"reflector-{number}.safetensors", run.device
                ),
                [*firsts, *middles],
                config.posttrain.rows,
                max_chunks=config.max_chunks,
                sampling_steps=config.sampling_steps(number),
                false_stops=config.posttrain.false_stops,
            )
        )
    envs = [every[i % len(every)][i] for i in range(len(every[0]))]
    split = len(firsts)
    return envs, list(range(split)), list(range(split, split + len(middles)))


def new_learner(run: Run, policy: Policy, number: int) -> Learner:
    """Of a round that begins with `policy`: its optimiser, its noise, a critic if advantages need
    one, and the imitated policy if it is held near that."""
    config, rl = run.config, run.config.posttrain
    groups = parameter_groups(policy, rl.lr, rl.head_lr)
    optimizer = torch.optim.AdamW(groups, rl.lr, betas=(0.9, 0.95), weight_decay=0)
    noise = exploration(policy.distribution, rl, run.embodiment.actions("translate"))
    learner = Learner(policy, optimizer, rl, noise)
    if rl.kl_weight:
        imitated = run.path("checkpoints") / "policy-sft.safetensors"
        learner.reference = twin(policy, store.read("policy", imitated, run.device)[0])
    if rl.critic:
        torch.manual_seed(derive(config.seed, "critic weights", number))
        learner.critic = critic = ValueHead(policy.feature_width).to(run.device)
        learner.critic_optimizer = torch.optim.AdamW(critic.parameters(), 1e-3, weight_decay=0)
    return learner


def _imagine(
    run: Run,
    learner: Learner,
    envs: list[ImaginedVectorEnv],
    firsts: list[int],
    middles: list[int],
    number: int,
    step: int,
) -> Trajectories:
    """G consecutive episodes of each context, in whichever world; without a critic, contexts are
    drawn until enough of them are informative."""
    rl = run.config.posttrain
    parts: list[Trajectories] = []
    informative = 0
    for draw in range(1 if rl.critic else rl.draws):
        keys = (number, step, draw) if draw else (number, step)
        if run.config.learned:
            parts.append(_imagine_contexts(run, learner, envs, firsts, middles, keys))
        else:
            parts.append(physics.real_groups(run, learner, keys))
        reward = episode_rewards(parts[-1], rl.reward)
        informative += int(group_advantages(reward, rl.group, "loop")[1].sum()) // rl.group
        if 2 * informative >= rl.contexts:
            break
    return join(parts)


@torch.no_grad()
def _imagine_contexts(
    run: Run,
    learner: Learner,
    envs: list[ImaginedVectorEnv],
    firsts: list[int],
    middles: list[int],
    key: tuple[int, ...],
) -> Trajectories:
    """G episodes from each of `contexts` contexts; key: of this draw's random numbers."""
    config, rl = run.config, run.config.posttrain
    bank, turn = envs[0].contexts, key[1] * rl.contexts
    won, tasks = [context.won for context in bank], [context.task for context in bank]
    g = generator(config.seed, "contexts", *key)
    chosen = choose_contexts(won, tasks, firsts, middles, rl, g, turn)
    pairs = [(c, n) for c in range(rl.contexts) for n in range(rl.group)]
    # One world seed for a group (common random numbers): its episodes differ by their actions
    # alone, and the baseline takes the world's luck away.
    starts = [
        Start(
            0,
            chosen[c],
            derive(config.seed, "world", *key, c),
            mistakes=derive(config.seed, "mistakes", *key, c, n),  # each episode its own
        )
        for c, n in pairs
    ]
    seeds = [derive(config.seed, "action", *key, c, n) for c, n in pairs]
    return rollout_shards(
        envs,
        learner.policy,
        starts,
        seeds=seeds,
        noise=learner.noise,
        features=learner.features,
    )


def choose_contexts(
    won: list[bool],
    tasks: list[int],
    firsts: list[int],
    middles: list[int],
    rl: PosttrainConfig,
    g: torch.Generator,
    turn: int = 0,
) -> list[int]:
    """Indices of `contexts` contexts, some from mid-episode and some from real failures; the tasks
    take turns, so that one that always fails, or succeeds, takes no more of them than another.

    won, tasks: of every context, whether its real episode succeeded, and at what. turn: how many
    were drawn before.
    """
    chosen = []
    every = sorted({tasks[c] for c in firsts})
    pools = {t: [[c for c in p if tasks[c] == t] for p in (firsts, middles)] for t in every}
    for k in range(turn, turn + rl.contexts):
        begins, on_their_way = pools[every[k % len(every)]]
        middle, lost = torch.rand(2, generator=g).tolist()
        pool = on_their_way if on_their_way and middle < rl.middle_contexts else begins
        outcome = lost >= rl.lost_contexts
        pool = [c for c in pool if won[c] == outcome] or pool
        chosen.append(pool[int(torch.randint(len(pool), (), generator=g))])
    return chosen


def _known_success(run: Run, number: int) -> float | None:
    """Real success of the policy that a round begins with, if the round before has checked it: the
    same episodes would end the same way."""
    if not number or run.config.posttrain.restart:
        return None
    return run.record(f"posttrain-{number - 1}")["kept_success"]


def _check_reality(
    run: Run,
    policy: Policy,
    envs: list[ImaginedVectorEnv],
    firsts: list[int],
    number: int,
    step: int,
    known: float | None,
) -> float:
    """Real success without noise on tuning starts (`known`, if it is); logs it and the imagined
    one."""
    config = run.config
    count = config.posttrain.real_check_episodes
    picked = firsts[:: max(1, len(firsts) // count)][:count]
    starts = [Start(0, c, derive(config.seed, "check world", c)) for c in picked]
    imagined = rollout_shards(
        envs, policy, starts, seeds=[0] * len(starts), noise=None, images=False
    )
    success = _real_success(run, policy, f"real check {number}.{step}") if known is None else known
    run.logger.log(
        f"check-{number}",
        step,
        imagined=float(imagined.terminated.float().mean()),
        real=success,
    )
    return success


def _real_success(run: Run, policy: Policy, label: str) -> float:
    """Share of the tuning episodes that succeed."""
    config, tuning = run.config, run.benchmark.tuning
    starts = [
        Start(task, k % tuning, derive(config.seed, "check fixture", k) % 2**31)
        for task in config.env.tasks
        for k in range(config.posttrain.real_check_episodes)
    ]
    outcomes = evaluate_policy(run, policy, starts, label)
    return sum(o["success"] for o in outcomes) / len(outcomes)


def _keep(policy: Policy, path: Path) -> None:
    with sharding.whole(policy) as acting:
        store.save("policy", acting, path)


def _save(partial: Partial, mark: str, learner: Learner, step: int, totals: dict) -> None:
    held = store.holds_all("policy")
    tensors = checkpoint.training_tensors(learner.policy, learner.optimizer, held)
    if learner.critic is not None:
        critic = checkpoint.training_tensors(learner.critic, learner.critic_optimizer)
        tensors |= checkpoint.prefixed("critic/", critic)
    partial.save(tensors, {"mark": mark, "step": step, "totals": totals})


def _resume(partial: Partial, mark: str, learner: Learner, best: Path) -> tuple[int, dict]:
    """(iterations done, totals) of an interrupted round, whose state learner then has."""
    fresh = {
        "frames": 0,
        "imagination_seconds": 0.0,
        "check_episodes": 0,
        "rl_episodes": 0,
        "kept_iteration": None,
        "kept_success": None,
    }
    path, like = partial.path, dict(learner.policy.state_dict())
    found = partial.resume(mark, {"step": int, "totals": dict}, like)
    if found is None:
        return 0, fresh
    tensors, metadata = found
    totals = metadata["totals"]
    try:
        if totals.keys() != fresh.keys():
            raise UserError(f"{path}: totals: expected {[*fresh]}, got {[*totals]}")
        if totals["kept_iteration"] is not None:
            saved, *_ = store.read("policy", best)
            own = checkpoint.weights(learner.policy, store.holds_all("policy"))
            checkpoint.check_fit(own, saved, best, "the policy")
        restored = _restored(learner, tensors)
        for *part, whole in restored:
            checkpoint.check_training(*part, path, whole)
    except UserError as error:
        print(f"the round begins anew: {error}")
        return 0, fresh
    for *part, whole in restored:
        checkpoint.load_training(*part, path, whole)
    return metadata["step"], totals


def _restored(learner: Learner, tensors: dict[str, Tensor]) -> list[tuple]:
    """What a checkpoint of `_save` restores: modules, their optimizers, the tensors of each, and
    whether those are all of it."""
    own = {k: v for k, v in tensors.items() if not k.startswith("critic/")}
    parts = [(learner.policy, learner.optimizer, own, store.holds_all("policy"))]
    if learner.critic is not None:
        critic = checkpoint.selected("critic/", tensors)
        parts.append((learner.critic, learner.critic_optimizer, critic, True))
    return parts
