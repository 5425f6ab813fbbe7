"""The few operations everything else is built from; one public function each, with a plain-torch
reference."""

from worldenv.ops.action_loss import action_logprob, action_loss
from worldenv.ops.adaln import modulated_norm
from worldenv.ops.advantage import gae, group_normalized, leave_one_out
from worldenv.ops.attention import spatiotemporal_attention
from worldenv.ops.backend import BackendUnavailable
from worldenv.ops.frame_cache import FrameCache, frame_attention

__all__ = [
    "BackendUnavailable",
    "FrameCache",
    "action_logprob",
    "action_loss",
    "frame_attention",
    "gae",
    "group_normalized",
    "leave_one_out",
    "modulated_norm",
    "spatiotemporal_attention",
]
