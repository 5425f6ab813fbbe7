"""Policy-gradient loss of Laplace or Gaussian action chunks on a GPU: loss, metrics and gradients
in one pass.

A program takes a block of rows (chunk steps), all A dimensions of each in registers. Sums leave as
one row of partials per program and are added in a fixed order, so the result is the same from run
to run. The number of unmasked rows is
read from the device: nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 64


@triton.jit
def action_loss_fwd_kernel(
    mu, log_scale, action, behaviour, advantage, mask, reference_mu, reference_scale, count,
    grad_mu, grad_scale, partial, rows, chunk, dims, clip_low, clip_high, kl_weight, entropy_weight,
    GAUSSIAN: tl.constexpr, HAS_MU: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    keep = (tl.load(mask + row, inside, other=0) != 0) & inside
    weight = 1.0 / tl.maximum(tl.load(count).to(tl.float32), 1.0)
    column = tl.arange(0, BLOCK_A)
    at = row[:, None] * dims + column[None, :]
    # Masked rows are never read: they may hold NaN.
    on = keep[:, None] & (column < dims)[None, :]
    m = tl.load(mu + at, on, other=0.0).to(tl.float32)
    ls = tl.load(log_scale + at, on, other=0.0).to(tl.float32)
    a = tl.load(action + at, on, other=0.0).to(tl.float32)
    inverse = tl.exp(-ls)
    z = (a - m) * inverse
    distance = tl.abs(z)
    sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, z))
    if GAUSSIAN:
        element = -0.5 * z * z - ls - 0.9189385332046727
        by_mu, by_scale = z * inverse, z * z - 1.0
        entropy = ls + 1.4189385332046727
    else:
        element = -distance - ls - 0.6931471805599453
        by_mu, by_scale = sign * inverse, distance - 1.0
        entropy = ls + 1.6931471805599454
    logprob = tl.sum(tl.where(on, element, 0.0), 1)
    log_ratio = tl.where(keep, logprob - tl.load(behaviour + row, keep, other=0.0), 0.0)
    ratio = tl.exp(log_ratio)
    gain = tl.load(advantage + row // chunk, keep, other=0.0)
    bounded = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    free, bound = ratio * gain, bounded * gain
    cut = bound < free
    slope = tl.where(cut, 0.0, -free * weight)
    g_mu = slope[:, None] * by_mu
    g_scale = slope[:, None] * by_scale - entropy_weight * weight
    kl = tl.zeros((BLOCK, BLOCK_A), tl.float32)
    if HAS_MU:
        delta = m - tl.load(reference_mu + at, on, other=0.0).to(tl.float32)
        log_ratio_scale = tl.zeros((BLOCK, BLOCK_A), tl.float32)
        other = inverse
        if HAS_SCALE:
            rs = tl.load(reference_scale + at, on, other=0.0).to(tl.float32)
            log_ratio_scale = ls - rs
            other = tl.exp(-rs)
        if GAUSSIAN:
            spread = tl.exp(2.0 * log_ratio_scale)
            far = delta * other
            kl = 0.5 * (spread + far * far - 1.0) - log_ratio_scale
            kl_mu, kl_scale = far * other, spread - 1.0
        else:
            far = tl.abs(delta)
            near = tl.exp(-far * inverse)
            mass = tl.exp(log_ratio_scale) * near
            kl = far * other + mass - 1.0 - log_ratio_scale
            side = tl.where(delta > 0, 1.0, tl.where(delta < 0, -1.0, delta))
            kl_mu, kl_scale = side * other * (1.0 - near), mass * (1.0 + far * inverse) - 1.0
        g_mu += kl_weight * weight * kl_mu
        g_scale += kl_weight * weight * kl_scale
    write = inside[:, None] & (column < dims)[None, :]
    tl.store(grad_mu + at, tl.where(on, g_mu, 0.0), write)
    tl.store(grad_scale + at, tl.where(on, g_scale, 0.0), write)
    to = partial + tl.program_id(0) * 8
    objective = tl.where(cut, bound, free)
    tl.store(to, tl.sum(tl.where(keep, objective, 0.0)))
    tl.store(to + 1, tl.sum(tl.where(on, kl, 0.0)))
    tl.store(to + 2, tl.sum(tl.where(on, entropy, 0.0)))
    tl.store(to + 3, tl.sum(tl.where(keep, ratio, 0.0)))
    tl.store(to + 4, tl.max(tl.where(keep, ratio, 0.0), 0))
    tl.store(to + 5, tl.sum(tl.where(keep & cut, 1.0, 0.0)))
    tl.store(to + 6, tl.sum(tl.where(keep, (ratio - 1.0) - log_ratio, 0.0)))
    tl.store(to + 7, tl.sum(tl.where(keep, 1.0, 0.0)))


def forward(
    mu: Tensor, log_scale: Tensor, action: Tensor, behaviour_logprob: Tensor, advantage: Tensor,
    mask: Tensor, reference_mu: Tensor | None, reference_log_scale: Tensor | None, gaussian: bool,
    clip_low: float, clip_high: float, kl_weight: float, entropy_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous tensors as in worldenv.ops.action_loss -> loss [], metrics [8], two gradients."""
    batch, chunk, dims = mu.shape
    rows = batch * chunk
    programs = triton.cdiv(rows, BLOCK_ROWS)
    grad_mu, grad_scale = torch.empty_like(mu), torch.empty_like(log_scale)
    partial = torch.empty(programs, 8, dtype=torch.float32, device=mu.device)
    count = mask.sum()
    action_loss_fwd_kernel[(programs,)](
        mu, log_scale, action, behaviour_logprob, advantage, mask,
        mu if reference_mu is None else reference_mu,
        mu if reference_log_scale is None else reference_log_scale,
        count, grad_mu, grad_scale, partial, rows, chunk, dims, clip_low, clip_high, kl_weight,
        entropy_weight, GAUSSIAN=gaussian, HAS_MU=reference_mu is not None,
        HAS_SCALE=reference_log_scale is not None, BLOCK=BLOCK_ROWS,
        BLOCK_A=max(2, triton.next_power_of_2(dims)), num_warps=4,
    )  # fmt: skip
    mean = partial.sum(0) / count.clamp_min(1)
    metrics = torch.stack(
        (-mean[0], mean[1], mean[2], mean[3], partial[:, 4].amax(), mean[5], mean[6], count.float())
    )
    loss = metrics[0] + kl_weight * metrics[1] - entropy_weight * metrics[2]
    return loss, metrics, grad_mu, grad_scale
