"""Policy-gradient loss over action chunks, and the log-probability it is built on.

Per chunk step: log-prob summed over A, ratio to the behaviour policy, clipped surrogate (separate
lower and upper clip), entropy, KL to a reference policy; masked mean over the chunk steps of all
rows. The fast backends compute loss and gradient in one pass. `action_logprob` runs the same
arithmetic as the loss of the same backend, so the first minibatch's ratio is exactly 1.

Distributions: `laplace` and `gaussian` (mu and log_scale of one shape), `categorical` (mu holds the
logits of K action tokens per dimension, log_scale is None, action holds token ids).

    loss = mean_mask(-min(r A, clip(r, 1-low, 1+high) A) + kl_weight KL(pi | ref) - entropy_weight
    H(pi))

Sources: PPO (arXiv 1707.06347), decoupled clip as in DAPO (arXiv 2503.14476), Laplace heads as in
OpenVLA-OFT.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldenv.ops import backend as backends
from worldenv.ops.checks import check_floating, check_shape, shape_of

DISTRIBUTIONS = ("laplace", "gaussian", "categorical")
METRICS = (
    "policy_loss",  # masked mean of the clipped surrogate, negated
    "kl_reference",  # masked mean KL to the reference, 0 without one
    "entropy",  # masked mean entropy, summed over A, nats
    "ratio_mean",
    "ratio_max",
    "clip_fraction",  # share of chunk steps whose gradient the clip removed
    "kl_behaviour",  # masked mean of (r - 1) - log r, an estimate of KL(behaviour | pi)
    "steps",  # unmasked chunk steps
)
_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def action_logprob_reference(
    mu: Tensor, log_scale: Tensor | None, action: Tensor, *, distribution: str = "laplace"
) -> Tensor:
    """Plain torch, in float32 or wider. Shapes as `action_logprob`."""
    wide = torch.promote_types(mu.dtype, torch.float32)
    if distribution == "categorical":
        logits = mu.to(wide)
        chosen = logits.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)
        return (chosen - logits.logsumexp(-1)).sum(-1)
    log_scale = log_scale.to(wide)
    z = (action.to(wide) - mu.to(wide)) * torch.exp(-log_scale)
    if distribution == "laplace":
        return (-z.abs() - log_scale - _LOG_2).sum(-1)
    return (-0.5 * z.square() - log_scale - _HALF_LOG_2PI).sum(-1)


def _entropy(mu: Tensor, log_scale: Tensor | None, distribution: str) -> Tensor:
    if distribution == "categorical":
        logp = mu.log_softmax(-1)
        return -(logp.exp() * logp).sum((-1, -2))
    constant = 1 + _LOG_2 if distribution == "laplace" else 0.5 + _HALF_LOG_2PI
    return (log_scale + constant).sum(-1)


def _kl(
    mu: Tensor,
    log_scale: Tensor | None,
    reference_mu: Tensor,
    reference_log_scale: Tensor | None,
    kind: str,
) -> Tensor:
    """KL(pi | reference) summed over A; without a reference scale the policy's own, held fixed, is
    used."""
    if kind == "categorical":
        logp, logq = mu.log_softmax(-1), reference_mu.log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum((-1, -2))
    if reference_log_scale is None:
        reference_log_scale = log_scale.detach()
    delta = (mu - reference_mu).abs()
    log_ratio = log_scale - reference_log_scale  # log(b / b_ref)
    if kind == "laplace":
        far = delta * torch.exp(-reference_log_scale)
        near = log_ratio.exp() * torch.exp(-delta * torch.exp(-log_scale))
        return (far + near - 1 - log_ratio).sum(-1)
    far = (delta * torch.exp(-reference_log_scale)).square()
    return (0.5 * ((2 * log_ratio).exp() + far - 1) - log_ratio).sum(-1)


def action_loss_reference(
    mu: Tensor,
    log_scale: Tensor | None,
    action: Tensor,
    behaviour_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    distribution: str = "laplace",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_mu: Tensor | None = None,
    reference_log_scale: Tensor | None = None,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain torch with autograd, in float32 or wider. Shapes as `action_loss`."""
    wide = torch.promote_types(mu.dtype, torch.float32)
    mu = mu.to(wide)
    log_scale = None if log_scale is None else log_scale.to(wide)
    keep = mask.bool()
    steps = keep.sum()
    count = steps.clamp_min(1).to(wide)

    def mean(x: Tensor) -> Tensor:
        return torch.where(keep, x, torch.zeros_like(x)).sum() / count

    logprob = action_logprob_reference(mu, log_scale, action, distribution=distribution)
    # A masked step may hold anything (an action of NaN, a ratio of inf): it must not reach the
    # gradient either.
    log_ratio = torch.where(keep, logprob - behaviour_logprob.to(wide), torch.zeros_like(logprob))
    ratio = log_ratio.exp()
    a = advantage.to(wide).unsqueeze(-1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy_loss = mean(-torch.minimum(ratio * a, clipped * a))
    entropy = mean(_entropy(mu, log_scale, distribution))
    kl = torch.zeros_like(policy_loss)
    if reference_mu is not None:
        other = None if reference_log_scale is None else reference_log_scale.to(wide)
        kl = mean(_kl(mu, log_scale, reference_mu.to(wide), other, distribution))
    loss = policy_loss + kl_weight * kl - entropy_weight * entropy
    with torch.no_grad():
        removed = (clipped * a < ratio * a).to(wide)
        top = torch.where(keep, ratio, torch.zeros_like(ratio))
        values = (
            policy_loss,
            kl,
            entropy,
            mean(ratio),
            top.max() if top.numel() else policy_loss * 0,
            mean(removed),
            mean((ratio - 1) - log_ratio),
            steps.to(wide),
        )
    return loss, {name: value.detach() for name, value in zip(METRICS, values, strict=True)}


def _check(
    op: str, mu: Tensor, log_scale: Tensor | None, action: Tensor, distribution: str
) -> None:
    if distribution not in DISTRIBUTIONS:
        raise ValueError(
            f"{op}: distribution must be one of {', '.join(DISTRIBUTIONS)}; got {distribution!r}"
        )
    check_floating(op, mu=mu)
    if distribution == "categorical":
        if mu.dim() != 4 or log_scale is not None:
            raise ValueError(
                f"{op}: categorical needs mu = logits [B,C,A,K] and log_scale=None, "
                f"got mu {shape_of(mu)}"
            )
        check_shape(op, "action", action, tuple(mu.shape[:3]), "B,C,A")
        if action.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: categorical needs integer action ids, got {action.dtype}")
        return
    check_floating(op, log_scale=log_scale, action=action)
    if mu.dim() != 3:
        raise ValueError(f"{op}: mu must be [B,C,A], got {shape_of(mu)}")
    check_shape(op, "log_scale", log_scale, tuple(mu.shape), "B,C,A")
    check_shape(op, "action", action, tuple(mu.shape), "B,C,A")


def action_logprob(
    mu: Tensor,
    log_scale: Tensor | None,
    action: Tensor,
    *,
    distribution: str = "laplace",
    backend: str = "auto",
) -> Tensor:
    """Log-probability of an action chunk, summed over A.

    Args:
        mu: [B, C, A] float (categorical: logits [B, C, A, K]).
        log_scale: [B, C, A], log of the Laplace b or the Gaussian sigma (categorical: None).
        action: [B, C, A] (categorical: integer ids).
        distribution: laplace | gaussian | categorical.
        backend: auto | reference.

    Returns:
        [B, C] in float32 (float64 for float64 inputs). Differentiable by the reference backend.
    """
    op = "action_logprob"
    _check(op, mu, log_scale, action, distribution)
    backends.choose(op, backend, {"reference": None})
    return action_logprob_reference(mu, log_scale, action, distribution=distribution)


def action_loss(
    mu: Tensor,
    log_scale: Tensor | None,
    action: Tensor,
    behaviour_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    distribution: str = "laplace",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reference_mu: Tensor | None = None,
    reference_log_scale: Tensor | None = None,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of action chunks, with its gradient in mu and log_scale.

    Args:
        mu, log_scale, action, distribution: as `action_logprob`; gradients flow to mu and
            log_scale.
        behaviour_logprob: [B, C], what `action_logprob` gave when the actions were sampled.
        advantage: [B].
        mask: [B, C], nonzero where the chunk step was taken while the episode ran. Masked steps may
            hold
            anything, NaN included: they reach neither loss nor gradient. All masked gives loss 0.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high], both >= 0.
        reference_mu, reference_log_scale: reference policy of the KL term, shaped like mu; without
            a scale the policy's own, held fixed, is used.
        kl_weight, entropy_weight: >= 0; kl_weight > 0 needs reference_mu.
        backend: auto | reference.

    Returns:
        (loss, metrics): a 0-d tensor and a dict of detached 0-d tensors named by `METRICS`. NaN in
            an unmasked
        input gives a NaN loss (the caller's guard sees it), never a crash.
    """
    op = "action_loss"
    _check(op, mu, log_scale, action, distribution)
    check_floating(op, behaviour_logprob=behaviour_logprob, advantage=advantage)
    rows = tuple(mu.shape[:2])
    check_shape(op, "behaviour_logprob", behaviour_logprob, rows, "B,C")
    check_shape(op, "mask", mask, rows, "B,C")
    check_shape(op, "advantage", advantage, rows[:1], "B")
    numbers = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "kl_weight": kl_weight,
        "entropy_weight": entropy_weight,
    }
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{op}: {name} must be >= 0, got {number}")
    if reference_mu is None and (kl_weight > 0 or reference_log_scale is not None):
        raise ValueError(f"{op}: kl_weight > 0 or reference_log_scale needs reference_mu, got None")
    for name, other in (
        ("reference_mu", reference_mu),
        ("reference_log_scale", reference_log_scale),
    ):
        if other is not None:
            check_shape(op, name, other, tuple(mu.shape), "B,C,A")
    backends.choose(op, backend, {"reference": None})
    return action_loss_reference(
        mu,
        log_scale,
        action,
        behaviour_logprob,
        advantage,
        mask,
        distribution=distribution,
        clip_low=clip_low,
        clip_high=clip_high,
        reference_mu=reference_mu,
        reference_log_scale=reference_log_scale,
        kl_weight=kl_weight,
        entropy_weight=entropy_weight,
    )
