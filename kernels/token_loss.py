"""Policy-gradient loss over categorical action tokens on a GPU: loss, metrics and the gradient of
the logits, without ever storing a probability.

A program takes one chunk step: for each of its A tokens it runs over the vocabulary once for the
log-sum-exp, once for entropy and KL, and once for the gradient; the second and third time the
logits come from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _log_sum_exp(logits, vocabulary, keep, BLOCK: tl.constexpr):
    """Over one token's vocabulary, online in each lane."""
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        on = (begin + lane < vocabulary) & keep
        x = tl.load(logits + begin + lane, on, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # max() drops a NaN; the sum must not.
        total = total * tl.exp(top - higher) + tl.where(x == x, tl.exp(x - higher), x)
        top = higher
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest)))


@triton.jit
def token_loss_fwd_kernel(
    logits, action, behaviour, advantage, mask, reference, count, grad, log_sums, partial, chunk,
    dims, vocabulary, clip_low, clip_high, kl_weight, entropy_weight,
    HAS_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    step = tl.program_id(0)
    row = step.to(tl.int64)
    keep = tl.load(mask + row) != 0  # a masked step is never read: it may hold NaN
    weight = 1.0 / tl.maximum(tl.load(count).to(tl.float32), 1.0)
    lane = tl.arange(0, BLOCK)
    logprob = 0.0
    for a in range(dims):
        at = (row * dims + a) * vocabulary
        log_sum = _log_sum_exp(logits + at, vocabulary, keep, BLOCK)
        tl.store(log_sums + row * dims + a, log_sum)
        token = tl.load(action + row * dims + a)
        known = (token >= 0) & (token < vocabulary) & keep
        logprob += tl.load(logits + at + token, known, other=float("nan")).to(tl.float32) - log_sum
    log_ratio = tl.where(keep, logprob - tl.load(behaviour + row, keep, other=0.0), 0.0)
    ratio = tl.exp(log_ratio)
    # step, not row: a 64-bit division is a call, and with it Triton 3.6's code spilled.
    gain = tl.load(advantage + step // chunk, keep, other=0.0)
    bounded = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    free = ratio * gain
    bound = bounded * gain
    cut = bound < free
    slope = tl.where(cut, 0.0, -free * weight)
    entropy = 0.0
    divergence = 0.0
    for a in range(dims):
        at = (row * dims + a) * vocabulary
        log_sum = tl.load(log_sums + row * dims + a)
        other_sum = 0.0
        if HAS_REFERENCE:
            other_sum = _log_sum_exp(reference + at, vocabulary, keep, BLOCK)
        h_lanes = tl.zeros((BLOCK,), tl.float32)
        d_lanes = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, vocabulary, BLOCK):
            on = (begin + lane < vocabulary) & keep
            logp = tl.load(logits + at + begin + lane, on, other=0.0).to(tl.float32) - log_sum
            p = tl.where(on, tl.exp(logp), 0.0)
            h_lanes -= tl.where(p > 0, p * logp, p)
            if HAS_REFERENCE:
                q = tl.load(reference + at + begin + lane, on, other=0.0).to(tl.float32)
                d_lanes += tl.where(p > 0, p * (logp - (q - other_sum)), p)
        h = tl.sum(h_lanes)
        d = tl.sum(d_lanes)
        entropy += h
        divergence += d
        token = tl.load(action + row * dims + a)
        for begin in range(0, vocabulary, BLOCK):
            inside = begin + lane < vocabulary
            on = inside & keep
            logp = tl.load(logits + at + begin + lane, on, other=0.0).to(tl.float32) - log_sum
            p = tl.exp(logp)
            g = slope * (tl.where(begin + lane == token, 1.0, 0.0) - p)
            g += entropy_weight * weight * tl.where(p > 0, p * (logp + h), p)
            if HAS_REFERENCE:
                q = tl.load(reference + at + begin + lane, on, other=0.0).to(tl.float32)
                far = tl.where(p > 0, p * (logp - (q - other_sum) - d), p)
                g += kl_weight * weight * far
            tl.store(grad + at + begin + lane, tl.where(on, g, 0.0), inside)
    to = partial + row * 8
    tl.store(to, tl.where(keep, tl.where(cut, bound, free), 0.0))
    tl.store(to + 1, tl.where(keep, divergence, 0.0))
    tl.store(to + 2, tl.where(keep, entropy, 0.0))
    tl.store(to + 3, tl.where(keep, ratio, 0.0))
    tl.store(to + 4, tl.where(keep, ratio, 0.0))
    tl.store(to + 5, tl.where(keep & cut, 1.0, 0.0))
    tl.store(to + 6, tl.where(keep, (ratio - 1.0) - log_ratio, 0.0))
    tl.store(to + 7, tl.where(keep, 1.0, 0.0))


def forward(
    logits: Tensor, action: Tensor, behaviour_logprob: Tensor, advantage: Tensor, mask: Tensor,
    reference_logits: Tensor | None, clip_low: float, clip_high: float, kl_weight: float,
    entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous tensors as in worldenv.ops.action_loss -> loss [], metrics [8], the gradient.

    A token id outside the vocabulary makes the loss NaN: the device is not read back to raise.
    """
    batch, chunk, dims, vocabulary = logits.shape
    rows = batch * chunk
    grad = torch.empty_like(logits)
    log_sums = torch.empty(rows, dims, dtype=torch.float32, device=logits.device)
    partial = torch.empty(rows, 8, dtype=torch.float32, device=logits.device)
    count = mask.sum()
    token_loss_fwd_kernel[(rows,)](
        logits, action, behaviour_logprob, advantage, mask,
        logits if reference_logits is None else reference_logits, count, grad, log_sums, partial,
        chunk, dims, vocabulary, clip_low, clip_high, kl_weight, entropy_weight,
        HAS_REFERENCE=reference_logits is not None,
        BLOCK=min(1024, triton.next_power_of_2(vocabulary)), num_warps=4,
    )  # fmt: skip
    mean = partial.sum(0) / count.clamp_min(1)
    metrics = torch.stack(
        (-mean[0], mean[1], mean[2], mean[3], partial[:, 4].amax(), mean[5], mean[6], count.float())
    )
    return metrics[0] + kl_weight * metrics[1] - entropy_weight * metrics[2], metrics, grad
