"""Images as models compute with them, and back."""

import torch
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """float [-1, 1] to uint8, rounded."""
    return images.clamp(-1, 1).add(1.0).mul_(127.5).round_().to(torch.uint8)
