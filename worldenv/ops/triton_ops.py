"""The Triton kernels as torch.library ops: schema (inferred), fake and autograd, for the public
functions beside.

Imported only where Triton can run. No postponed annotations here: the schemas are read from these.
"""

import torch
from torch import Tensor

from worldenv.kernels import action_loss as action_loss_kernels
from worldenv.kernels import adaln as adaln_kernels
from worldenv.kernels import attention as attention_kernels
from worldenv.kernels import attention_backward
from worldenv.kernels import frame_attention as frame_kernels
from worldenv.kernels import norm_rotary as rotary_kernels
from worldenv.kernels import token_loss as token_kernels


@torch.library.custom_op("worldenv::attention_fwd_triton", mutates_args=())
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    window: int | None,
    sinks: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """q [B,F,S,H,D], k, v [B,F,S,Hk,D] -> out, log-sum-exp [B,H,F*S]. With keys and values of
    clean frames before the F noisy ones, q may hold all 2 F."""
    return attention_kernels.forward(q, k, v, _pair(past_k, past_v), window, sinks, causal)


def _pair(k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if k is None or v is None else (k, v)


@attention_fwd.register_fake
def _(q, k, v, past_k, past_v, window, sinks, causal):
    batch, frames, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, frames * tokens, dtype=torch.float32)
    return q.new_empty(q.shape), lse


@torch.library.custom_op("worldenv::attention_bwd_triton", mutates_args=())
def attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor | None,
    past_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int | None,
    sinks: int,
    causal: bool,
    into_past: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, past_k and past_v; the last two empty where none is wanted."""
    saved = (q, k, v, _pair(past_k, past_v), out, lse)
    return attention_backward.backward(grad, *saved, window, sinks, causal, into_past)


@attention_bwd.register_fake
def _(grad, q, k, v, past_k, past_v, out, lse, window, sinks, causal, into_past):
    past = [x.new_empty(x.shape if into_past else 0) for x in (k, v)]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *past


def _attention_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[5:]


def _attention_backward(ctx, grad, _):
    into_past = any(ctx.needs_input_grad[3:5])
    grads = attention_bwd(grad, *ctx.saved_tensors, *ctx.options, into_past)
    return *(grads if into_past else (*grads[:3], None, None)), None, None, None


attention_fwd.register_autograd(_attention_backward, setup_context=_attention_context)


@torch.library.custom_op("worldenv::frame_attention_triton", mutates_args=())
def frame_attention(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, table: Tensor, cached: Tensor
) -> Tensor:
    """q [B,S,H,D] over a plain cache [B,Hk,slots,S,D] and the frame's own k, v [B,S,Hk,D]."""
    return frame_kernels.forward(q, k, v, cache_k, cache_v, table, cached)


@frame_attention.register_fake
def _(q, k, v, cache_k, cache_v, table, cached):
    return q.new_empty(q.shape)


@torch.library.custom_op("worldenv::modulated_norm_fwd_triton", mutates_args=())
def modulated_norm_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [R,E], shift and scale [R/share,E] -> out [R,E], mean [R], rstd [R]."""
    return adaln_kernels.forward(x, shift, scale, eps)


@modulated_norm_fwd.register_fake
def _(x, shift, scale, eps):
    rows = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), rows, rows.clone()


@torch.library.custom_op("worldenv::modulated_norm_bwd_triton", mutates_args=())
def modulated_norm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale; the latter two in float32."""
    return adaln_kernels.backward(grad, x, scale, mean, rstd)


@modulated_norm_bwd.register_fake
def _(grad, x, scale, mean, rstd):
    part = scale.new_empty(scale.shape, dtype=torch.float32)
    return x.new_empty(x.shape), part, part.clone()


def _norm_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[2], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.modulation_dtype = inputs[1].dtype


def _norm_backward(ctx, grad, *_):
    grad_x, grad_shift, grad_scale = modulated_norm_bwd(grad, *ctx.saved_tensors)
    scale = ctx.saved_tensors[1]
    return grad_x, grad_shift.to(ctx.modulation_dtype), grad_scale.to(scale.dtype), None


modulated_norm_fwd.register_autograd(_norm_backward, setup_context=_norm_context)


@torch.library.custom_op("worldenv::norm_rotary_triton", mutates_args=())
def norm_rotary(x: Tensor, weight: Tensor, rotary: Tensor, eps: float) -> Tensor:
    """x [R,E], weight [E], rotary [turns,D] -> out [R,E]; row r takes rotary r % turns."""
    return rotary_kernels.forward(x, weight, rotary, eps)


@norm_rotary.register_fake
def _(x, weight, rotary, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("worldenv::norm_rotary_bwd_triton", mutates_args=())
def norm_rotary_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, rotary: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    return rotary_kernels.backward(grad, x, weight, rotary, eps)


@norm_rotary_bwd.register_fake
def _(grad, x, weight, rotary, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rotary_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _rotary_backward(ctx, grad):
    return *norm_rotary_bwd(grad.contiguous(), *ctx.saved_tensors, ctx.eps), None, None


norm_rotary.register_autograd(_rotary_backward, setup_context=_rotary_context)


@torch.library.custom_op("worldenv::action_loss_triton", mutates_args=())
def action_loss(
    mu: Tensor,
    log_scale: Tensor,
    action: Tensor,
    behaviour_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_mu: Tensor | None,
    reference_log_scale: Tensor | None,
    distribution: int,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of worldenv::action_loss (csrc/ops.cpp)."""
    return action_loss_kernels.forward(
        mu,
        log_scale,
        action,
        behaviour_logprob,
        advantage,
        mask,
        reference_mu,
        reference_log_scale,
        distribution == 1,
        clip_low,
        clip_high,
        kl_weight,
        entropy_weight,
    )


@torch.library.custom_op("worldenv::token_loss_triton", mutates_args=())
def token_loss(
    logits: Tensor,
    action: Tensor,
    behaviour_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    reference_logits: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of worldenv::token_loss (csrc/ops.cpp)."""
    return token_kernels.forward(
        logits,
        action,
        behaviour_logprob,
        advantage,
        mask,
        reference_logits,
        clip_low,
        clip_high,
        kl_weight,
        entropy_weight,
    )
