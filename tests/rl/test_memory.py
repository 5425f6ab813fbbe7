"""A policy is trained as if it had 7 billion parameters: nothing frozen is copied or written."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_world import ToyEnv, seeds, starts

from worldenv.config import PolicyConfig, PosttrainConfig
from worldenv.envs.libero.robot import embodiment
from worldenv.models.policy import ValueHead
from worldenv.presets import preset
from worldenv.rl.noise import Laplace
from worldenv.rl.policy import parameter_groups, trainable, twin
from worldenv.rl.rollout import rollout
from worldenv.rl.update import Learner, update
from worldenv.runtime import checkpoint, parallel
from worldenv.runtime.partial import Partial
from worldenv.stages import posttrain, store, training
from worldenv.stages.run import Run

WIDTH, RANK = 1024, 32


class Large(nn.Module):
    """A frozen trunk with a trained low-rank addition, and a trained head."""

    distribution, feature_width = "laplace", WIDTH
    config, embodiment = PolicyConfig(), embodiment(64)

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(2, WIDTH)
        self.trunk = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.requires_grad_(False)
        self.trunk.to(torch.bfloat16)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 4)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, observation):
        return self.both(observation)[:2]

    def both(self, observation):
        x = self.enter(observation["proprio"] - self.mean)
        for layer in self.trunk:
            x = x + layer(torch.tanh(x).to(torch.bfloat16)).float()
        x = x + self.up(self.down(x))
        mu = self.head(x).view(-1, 2, 2)
        return mu, torch.full_like(mu, -1.0), x

    def trainable_groups(self):
        return {
            "adapter": [self.down.weight, self.up.weight],
            "heads": [self.head.weight, self.head.bias],
        }


def held(tensors) -> int:
    return sum(t.nbytes for t in tensors)


class Counter(TorchDispatchMode):
    """Bytes of the tensors made under it: alive now, and most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in old:
                self.count(x.untyped_storage())
        return out

    def count(self, storage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.freed, storage.nbytes())

    def freed(self, size: int) -> None:
        self.alive -= size


def learner(**changes) -> Learner:
    torch.manual_seed(0)
    policy = Large()
    changes = {"max_mu_change": 100.0, "max_clip_fraction": 1.0, "micro_batch": 4, **changes}
    config = PosttrainConfig(group=4, lr=1e-3, head_lr=1e-2, **changes)
    groups = parameter_groups(policy, config.lr, config.head_lr)
    agent = Learner(
        policy, torch.optim.AdamW(groups, weight_decay=0), config, Laplace(1.0, 0.0, ())
    )
    if config.critic:
        agent.critic = ValueHead(WIDTH, 8)
        agent.critic_optimizer = torch.optim.AdamW(agent.critic.parameters(), 1e-3)
    return agent


def episodes(agent: Learner):
    return rollout(
        ToyEnv(8),
        agent.policy,
        starts(16, 6),
        seeds=seeds(16),
        noise=agent.noise,
        images=True,
        features=agent.features,
    )


@pytest.mark.parametrize("undone", [False, True])
def test_an_update_needs_a_few_times_what_is_trained(monkeypatch, undone):
    """It cloned the whole policy, at each step; the second time the optimizer has its moments."""
    monkeypatch.setattr(parallel, "SHARDS", 1)  # as on a GPU, and all in this thread
    agent = learner(kl_weight=0.1, **({"max_mu_change": 1e-9} if undone else {}))
    agent.reference = twin(agent.policy, checkpoint.weights(agent.policy, frozen=False))
    seen = episodes(agent)
    trained = held(trainable(agent.policy).values())
    frozen = held(agent.policy.parameters()) - trained
    assert frozen > 25 * trained
    before = [p.clone() for p in agent.policy.trunk.parameters()]
    for step in range(2):
        with Counter() as counter:
            assert update(agent, seen, 0, step)["undone"] == undone
        assert 2 * trained < counter.peak < 10 * trained
    assert all(map(torch.equal, before, agent.policy.trunk.parameters()))


def test_a_reference_shares_all_but_what_is_trained():
    policy = learner().policy
    nn.init.ones_(policy.up.weight)
    tensors = checkpoint.weights(policy, frozen=False)
    assert set(tensors) == {"down.weight", "up.weight", "head.weight", "head.bias", "mean"}
    tensors = {name: t.clone() for name, t in tensors.items()}
    view = {"proprio": torch.randn(3, 2)}
    asked = [x.clone() for x in policy.both(view)]
    with Counter() as counter:
        reference = twin(policy, tensors)
    assert counter.alive == held(tensors.values())
    assert not any(p.requires_grad for p in reference.parameters())
    shared = {p.data_ptr() for p in policy.parameters()} & {
        p.data_ptr() for p in reference.parameters()
    }
    assert len(shared) == sum(not p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter.add_(1)
    assert all(map(torch.equal, asked, reference.both(view)))
    assert not torch.equal(asked[2], policy.both(view)[2])


def test_both_rates_are_halved_where_an_update_is_undone():
    agent = learner(max_mu_change=1e-9)
    before = {name: p.clone() for name, p in trainable(agent.policy).items()}
    metrics = update(agent, episodes(agent), 0, 0)
    assert (metrics["undone"], metrics["lr"], metrics["lr_1"]) == (1, 5e-4, 5e-3)
    assert all(torch.equal(before[n], p) for n, p in trainable(agent.policy).items())


def test_gradients_of_small_batches_add_up_to_those_of_a_minibatch():
    changed = []
    for micro in (0, 3):
        agent = learner(micro_batch=micro)
        update(agent, episodes(agent), 0, 0)
        changed.append([p.grad for p in trainable(agent.policy).values()])
    for whole, parts in zip(*changed, strict=True):
        torch.testing.assert_close(whole, parts)


def test_groups_that_leave_something_out_are_refused():
    policy = Large()
    policy.trunk[0].float().requires_grad_(True)
    with pytest.raises(ValueError, match=r"Large.trainable_groups: expected every parameter"):
        parameter_groups(policy, 1e-3)
    policy = Large()
    policy.trunk[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"trunk.0.weight: expected .* float32, got .*bfloat16"):
        trainable(policy)


def names(path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def test_no_frozen_tensor_is_written(tmp_path, monkeypatch):
    agent = learner()
    update(agent, episodes(agent), 0, 0)
    frozen = {n for n, p in agent.policy.named_parameters() if not p.requires_grad}
    assert len(frozen) == 10

    # A round in progress, which is gone on from.
    partial, best = tmp_path / "partial", tmp_path / "best"
    totals = {"frames": 0, "imagination_seconds": 0.0, "check_episodes": 0, "rl_episodes": 0}
    totals |= {"kept_iteration": 1, "kept_success": 0.5}
    posttrain._save(Partial(partial), "mark", agent, 1, totals)
    store.save("policy", agent.policy, best)
    for path in (partial, best):
        written = {name.removeprefix("model/") for name in names(path)}
        assert not written & frozen
        assert {"up.weight", "mean"} <= written
    again = learner()
    assert posttrain._resume(Partial(partial), "mark", again, best) == (1, totals)
    ours, theirs = (checkpoint.training_tensors(a.policy, a.optimizer) for a in (agent, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    # A finished policy, built again about its folder.
    monkeypatch.setattr(store, "_build", lambda kind, part, robot: learner().policy)
    loaded = store.load("policy", best).state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in agent.policy.state_dict().items())


def test_imitation_writes_no_frozen_tensor_and_has_two_rates(tmp_path, monkeypatch):
    policy, view = Large(), {"proprio": torch.randn(8, 2)}
    saved = []
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(
        training.checkpoint, "save", lambda path, tensors, metadata: saved.append(tensors)
    )
    run = SimpleNamespace(
        device=torch.device("cpu"),
        path=tmp_path.joinpath,
        logger=SimpleNamespace(rewind=lambda *a: None, log=lambda *a, **k: None),
    )

    def loss_at(step: int, shard: int):
        loss = (policy(view)[0] - 1).square().mean()
        return loss, {"loss": loss.detach()}

    training.train(
        run,
        "toy",
        "mark",
        policy,
        loss_at,
        steps=3,
        lr=1e-3,
        groups=parameter_groups(policy, 1e-3, 1e-2),
        frozen=False,
    )
    assert len(saved) == 3
    assert {n for n in saved[0] if n.startswith("model/")} == {
        "model/" + name for name in ("down.weight", "up.weight", "head.weight", "head.bias", "mean")
    }
    rates = [float(saved[1][f"optimizer/group/{k}/lr"]) for k in (0, 1)]
    assert rates[1] == pytest.approx(10 * rates[0])


def test_the_critic_is_a_head_on_the_policys_features(tmp_path):
    run = Run(replace(preset("smoke"), run_dir=tmp_path, device="cpu"))
    policy = store.build("policy", run.config)
    agent = posttrain.new_learner(run, policy, 0)
    run.close()
    assert agent.features
    assert agent.reference is None
    assert held(agent.critic.parameters()) < held(policy.parameters()) / 10
    views = torch.zeros(3, 2, 64, 64, 3, dtype=torch.uint8)
    seen = {"image": views, "proprio": torch.zeros(3, 8), "instruction": ("go",) * 3}
    assert agent.critic(policy.both(seen)[2]).shape == (3,)
