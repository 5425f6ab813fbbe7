"""The few operations everything else is built from; one public function each, with a plain-torch
reference."""

from worldenv.ops.action_loss import action_logprob, action_loss
from worldenv.ops.adaln import modulated_norm
from worldenv.ops.advantage import gae, group_normalized, leave_one_out
from worldenv.ops.attention import spatiotemporal_attention
from worldenv.ops.backend import BackendUnavailable
from worldenv.ops.frame_cache import FrameCache, frame_attention
from worldenv.ops.gelu import gelu
from worldenv.ops.norm_rotary import norm_rotary

__all__ = [
    "BackendUnavailable",
    "FrameCache",
    "action_logprob",
    "action_loss",
    "frame_attention",
    "gae",
    "gelu",
    "group_normalized",
    "leave_one_out",
    "modulated_norm",
    "norm_rotary",
    "spatiotemporal_attention",
]
