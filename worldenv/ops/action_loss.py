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
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # computed in float32
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
) -> tuple[Tensor, Tensor]:
    """Plain torch with autograd, in float32 or wider. Shapes as `action_loss`."""
    wide = torch.promote_types(mu.dtype, torch.float32)
    keep = mask.bool()
    # A masked step may hold anything: chosen away here, it reaches no gradient (NaN * 0 is NaN).
    mu, log_scale, action, reference_mu, reference_log_scale = (
        None if x is None else torch.where(keep[(..., *[None] * (x.dim() - 2))], x, 0)
        for x in (mu, log_scale, action, reference_mu, reference_log_scale)
    )
    mu = mu.to(wide)
    log_scale = None if log_scale is None else log_scale.to(wide)
    steps = keep.sum()
    count = steps.clamp_min(1).to(wide)

    def mean(x: Tensor) -> Tensor:
        return torch.where(keep, x, torch.zeros_like(x)).sum() / count

    logprob = action_logprob_reference(mu, log_scale, action, distribution=distribution)
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
        metrics = (
            policy_loss,
            kl,
            entropy,
            mean(ratio),
            top.max() if top.numel() else policy_loss * 0,
            mean(removed),
            mean((ratio - 1) - log_ratio),
            steps.to(wide),
        )
    return loss, torch.stack(metrics)


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
        backend: auto | cpp | reference.

    Returns:
        [B, C] in float32 (float64 for float64 inputs). Differentiable by the reference backend,
        which `auto` takes when an input requires a gradient.
    """
    op = "action_logprob"
    _check(op, mu, log_scale, action, distribution)
    why_not = {
        "cpp": backends.no_cpp(mu.device, mu.dtype, _DTYPES) or backends.no_gradient(mu, log_scale),
        "reference": None,
    }
    if backends.choose(op, backend, why_not) == "reference":
        return action_logprob_reference(mu, log_scale, action, distribution=distribution)
    if distribution == "categorical":
        return torch.ops.worldenv.token_logprob(_ready(mu), _ids(action))
    inputs = (_ready(x) for x in (mu, log_scale, action))
    return torch.ops.worldenv.action_logprob(*inputs, DISTRIBUTIONS.index(distribution))


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
) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss of action chunks, with its gradient in mu and log_scale.

    Args:
        mu, log_scale, action, distribution: as `action_logprob`; gradients flow to mu and
            log_scale.
        behaviour_logprob: [B, C], what `action_logprob` gave when the actions were sampled.
        advantage: [B].
        mask: [B, C], nonzero where the chunk step was taken while the episode ran. Masked steps may
            hold anything, NaN included: they reach neither loss nor gradient. All masked gives
            loss 0.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high], both >= 0.
        reference_mu, reference_log_scale: reference policy of the KL term, shaped like mu; without
            a scale the policy's own, held fixed, is used.
        kl_weight, entropy_weight: >= 0; kl_weight > 0 needs reference_mu.
        backend: auto | triton | cpp | reference.

    Returns:
        (loss, metrics): a 0-d tensor and [8], detached, in the order of `METRICS`. NaN in an
            unmasked input gives a NaN loss (the caller's guard sees it), never a crash.
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
    categorical = distribution == "categorical"
    why_not = {
        "triton": backends.no_triton(mu),
        "cpp": backends.no_cpp(mu.device, mu.dtype, _DTYPES),
        "reference": None,
    }
    name = backends.choose(op, backend, why_not)
    if name == "reference" or (name == "triton" and mu.numel() == 0):
        return action_loss_reference(
            mu,
            log_scale,
            action,
            behaviour_logprob,
            advantage,
            mask,
            distribution=distribution,
            reference_mu=reference_mu,
            reference_log_scale=reference_log_scale,
            **numbers,
        )
    rows = (_ready(behaviour_logprob), _ready(advantage), _bool(mask))
    reference = None if reference_mu is None else _ready(reference_mu)
    constants = (clip_low, clip_high, kl_weight, entropy_weight)
    if categorical:
        inputs = (_ready(mu), _ids(action), *rows, reference, *constants)
        ops = torch.ops.worldenv
        chosen = ops.token_loss_triton if name == "triton" else ops.token_loss
        out = _call(chosen.default, inputs)
    else:
        scale = None if reference_log_scale is None else _ready(reference_log_scale)
        index = DISTRIBUTIONS.index(distribution)
        inputs = (_ready(mu), _ready(log_scale), _ready(action), *rows, reference, scale)
        ops = torch.ops.worldenv
        chosen = ops.action_loss_triton if name == "triton" else ops.action_loss
        out = _call(chosen.default, (*inputs, index, *constants))
    return out[0], out[1]


def _ready(x: Tensor) -> Tensor:
    ready = x.dtype == torch.float32 and x.is_contiguous()
    return x if ready else x.float().contiguous()


def _ids(x: Tensor) -> Tensor:
    return x.long().contiguous()


def _bool(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.bool else x != 0).contiguous()


class _OnePass(torch.autograd.Function):
    """The gradient registered below, without the 0.1 ms a registered one costs per eager call."""

    @staticmethod
    def forward(ctx, op, *inputs) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, metrics, *gradients = op(*inputs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(metrics)
        ctx.arguments = len(inputs)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if grad_loss.device.type == "cpu" and grad_loss.item() == 1.0:  # plain loss.backward()
            return None, *ctx.saved_tensors, *([None] * (ctx.arguments - len(ctx.saved_tensors)))
        return None, *_scale_gradients(ctx, grad_loss)


def _call(op: torch._ops.OpOverload, inputs: tuple) -> tuple[Tensor, Tensor]:
    """Loss and metrics of a one-pass op; tracing takes the op and its registered gradient."""
    if torch.compiler.is_compiling():
        return op(*inputs)[:2]
    return _OnePass.apply(op, *inputs)


def _save_gradients(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.arguments = len(inputs)


def _scale_gradients(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradients = [g * grad_loss for g in ctx.saved_tensors]
    return (*gradients, *([None] * (ctx.arguments - len(gradients))))


def _register(op: str) -> None:
    """Shapes for tracing, and the gradient, which the forward pass has already computed."""
    gradients = 1 if op.startswith("token") else 2

    def fake(mu: Tensor, *_) -> tuple[Tensor, ...]:
        return mu.new_empty(()), mu.new_empty(8), *(torch.empty_like(mu) for _ in range(gradients))

    torch.library.register_fake(f"worldenv::{op}", fake)
    torch.library.register_autograd(
        f"worldenv::{op}", _scale_gradients, setup_context=_save_gradients
    )


if backends.NO_TRITON is None:
    from worldenv.ops import triton_ops  # noqa: F401 (defines the two ops)

    _register("action_loss_triton")
    _register("token_loss_triton")

if backends.NO_CPP is None:
    _register("action_loss")
    _register("token_loss")
    for _name in ("action_logprob", "token_logprob"):
        torch.library.register_fake(f"worldenv::{_name}", lambda mu, *_: mu.new_empty(mu.shape[:2]))
