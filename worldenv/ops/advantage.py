"""Advantages for policy optimisation: leave-one-out, group-normalised, and GAE with separate masks.

Rewards that are equal within a group give exactly zero: values are centred on the group's first
member before any rounding sum is taken. Backends of `gae`: `cpp`, `cuda` (one scan), `reference` (a
torch loop over T).
Sources: LOOP / RLOO (arXiv 2402.14740), GRPO (arXiv 2402.03300), GAE (arXiv 1506.02438).
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, check_shape, shape_of

_DTYPES = (torch.float32, torch.float64)


def _groups(op: str, reward: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor, int]:
    """Centre rewards on their group's first member: (centred [N], group id [N], number of
    groups)."""
    check_floating(op, reward=reward)
    if reward.dim() != 1:
        raise ValueError(f"{op}: reward must be [N*G], got {shape_of(reward)}")
    n = reward.shape[0]
    if isinstance(group, Tensor):
        if group.dtype not in (torch.int32, torch.int64) or tuple(group.shape) != (n,):
            raise ValueError(
                f"{op}: group ids must be integers of shape ({n},), "
                f"got {group.dtype} {shape_of(group)}"
            )
        _, ids = torch.unique(group, return_inverse=True)
        count = int(ids.max()) + 1 if n else 0
    else:
        if group < 1 or n % group:
            raise ValueError(f"{op}: group must be >= 1 and divide the {n} rewards, got {group}")
        ids = torch.arange(n, device=reward.device) // group
        count = n // group
    order = torch.arange(n, device=reward.device)
    first = torch.full((count,), n, device=reward.device).scatter_reduce_(0, ids, order, "amin")
    return reward - reward[first][ids], ids, count


def _group_mean(x: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size = torch.zeros(count, dtype=x.dtype, device=x.device).index_add_(0, ids, torch.ones_like(x))
    total = torch.zeros(count, dtype=x.dtype, device=x.device).index_add_(0, ids, x)
    return (total / size)[ids], size[ids]


def leave_one_out(reward: Tensor, group: int | Tensor) -> Tensor:
    """Reward minus the mean reward of the other members of its group.

    Args:
        reward: [N*G] float, one per episode.
        group: size G of consecutive groups, or integer ids [N*G] for ragged groups (that form reads
            the number of groups back to the host).

    Returns:
        [N*G]. A group of one, having nothing to compare with, gives 0.
    """
    if (
        not isinstance(group, Tensor)
        and reward.dim() == 1
        and group > 1
        and reward.numel() % group == 0
    ):
        check_floating("leave_one_out", reward=reward)
        rows = reward.view(-1, group)
        centred = rows - rows[:, :1]
        return ((centred - centred.mean(1, keepdim=True)) * (group / (group - 1))).flatten()
    centred, ids, count = _groups("leave_one_out", reward, group)
    mean, size = _group_mean(centred, ids, count)
    return (centred - mean) * size / (size - 1).clamp_min(1)


def group_normalized(reward: Tensor, group: int | Tensor, eps: float = 1e-6) -> Tensor:
    """(reward - group mean) / (group standard deviation + eps), population deviation.

    Args:
        reward: [N*G] float; group: size or ids as in `leave_one_out`; eps: > 0, keeps equal groups
            at 0.
    """
    if eps <= 0:
        raise ValueError(f"group_normalized: eps must be > 0, got {eps}")
    centred, ids, count = _groups("group_normalized", reward, group)
    mean, _ = _group_mean(centred, ids, count)
    deviation = centred - mean
    variance, _ = _group_mean(deviation.square(), ids, count)
    return deviation / (variance.sqrt() + eps)


def gae_reference(
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Plain torch loop over T. Shapes as `gae`."""
    going = ~terminated
    unbroken = ~(terminated | truncated)
    bootstrap = torch.where(going, value[1:], torch.zeros_like(reward))
    delta = reward + gamma * bootstrap - value[:-1]
    advantage = torch.empty_like(reward)
    carry = torch.zeros_like(reward[0]) if reward.shape[0] else None
    for t in range(reward.shape[0] - 1, -1, -1):
        carry = delta[t] + gamma * lam * torch.where(unbroken[t], carry, torch.zeros_like(carry))
        advantage[t] = carry
    return advantage, advantage + value[:-1]


def gae(
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over T steps of B environments.

    Args:
        reward: [T, B] float.
        value: [T+1, B]; value[t+1] is the value of the observation that step t led to (before any
            reset).
        terminated: [T, B] bool; no bootstrap and no trace beyond such a step.
        truncated: [T, B] bool; bootstraps from value[t+1], the trace stops.
        gamma, lam: in [0, 1].
        backend: auto | cpp | cuda | reference.

    Returns:
        (advantage [T, B], value target [T, B] = advantage + value[:-1]). No gradient.
    """
    op = "gae"
    check_floating(op, reward=reward, value=value)
    if reward.dim() != 2:
        raise ValueError(f"{op}: reward must be [T,B], got {shape_of(reward)}")
    steps, batch = reward.shape
    check_shape(op, "value", value, (steps + 1, batch), "T+1,B")
    for name, mask in (("terminated", terminated), ("truncated", truncated)):
        check_shape(op, name, mask, reward.shape, "T,B")
        if mask.dtype is not torch.bool:
            raise TypeError(f"{op}: {name} must be bool, got {mask.dtype}")
    if not (0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        raise ValueError(f"{op}: gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    unfit = None
    if value.dtype != reward.dtype or reward.dtype not in _DTYPES:
        unfit = f"it takes float32 or float64, got {reward.dtype} and {value.dtype}"
    why_not = {
        "cpp": unfit or backends.no_cpp(reward.device, reward.dtype, _DTYPES),
        "cuda": unfit or backends.no_cuda(reward, op),
        "reference": None,
    }
    if reward.requires_grad or value.requires_grad:
        reward, value = reward.detach(), value.detach()
    if backends.choose(op, backend, why_not) == "reference":
        return gae_reference(reward, value, terminated, truncated, gamma=gamma, lam=lam)
    reward, value = reward.contiguous(), value.contiguous()
    terminated, truncated = terminated.contiguous(), truncated.contiguous()
    return torch.ops.worldenv.gae.default(reward, value, terminated, truncated, gamma, lam)


if backends.NO_CPP is None:

    @torch.library.register_fake("worldenv::gae")
    def _(
        reward: Tensor,
        value: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        gamma: float,
        lam: float,
        isa: int = -1,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(reward), torch.empty_like(reward)
