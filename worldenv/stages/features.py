"""What a frozen encoder sees in sequences of frames, kept on the disk: it is computed once.

    features/<encoder>/<sequence>.safetensors    in the run folder

One file a sequence, named by its frames and its instruction, so that a later round, a repeated run
and one that was interrupted find what is there. A sequence is encoded whatever others there are,
and so a stored feature is the one that would be computed, bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from worldenv.data.windows import FrameSequence
from worldenv.runtime import checkpoint, parallel, progress
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import derive
from worldenv.stages.run import Run

if TYPE_CHECKING:
    from worldenv.models.vlm_reflector import ImageTextReflector  # whose library is slow to import

DROPOUT = 0.2  # of the head's hidden numbers, drawn like everything else from the step's generator
LATE_START = 0.3  # episodes judged as if they had begun later, as contexts in mid-episode do


class Features:
    """What a frozen encoder has seen in the frames, once: pictures are not augmented, and an
    episode may begin late at one frame of its own."""

    def __init__(
        self, run: Run, reflector: ImageTextReflector, shown: list[FrameSequence], data: dict
    ) -> None:
        del data["images"]
        self.proprio = data["proprio"]
        seen = encoded(run, reflector, shown)
        frames = data["valid"].shape[1]
        self.begin = torch.tensor([s.begin for s in seen], device=run.device)
        table = torch.zeros(
            2, len(seen), frames, seen[0].whole.shape[-1], dtype=seen[0].whole.dtype
        )
        for i, s in enumerate(seen):
            table[0, i, : len(s.whole)], table[1, i, s.begin : len(s.whole)] = s.whole, s.late
        self.table = table.to(run.device)  # [from the first frame or late, N, F, E]

    def judge(
        self, reflector: ImageTextReflector, rows: Tensor, ends: Tensor, g: torch.Generator
    ) -> Tensor:
        """Logits `[B]` of frames `ends` in episodes `rows`."""
        late = torch.rand(len(rows), generator=g).to(ends.device) < LATE_START
        late &= ends >= self.begin[rows]
        proprio = self.proprio[rows, ends]
        jitter = 0.05 * torch.randn(proprio.shape, generator=g).to(proprio.device)
        keep = torch.rand(len(rows), reflector.config.width, generator=g).to(ends.device)
        features = self.table[late.long(), rows, ends]
        proprio = proprio + jitter * reflector.proprio_std
        return reflector.judge(features, proprio, keep > DROPOUT)


@dataclass(frozen=True)
class Seen:
    """Features `[F, E]` of a sequence's frames, seen from its first; and, from frame `begin` on,
    `[F - begin, E]` as if the episode had begun there."""

    whole: Tensor
    late: Tensor
    begin: int


def encoded(run: Run, reflector: ImageTextReflector, sequences: list[FrameSequence]) -> list[Seen]:
    """What the reflector's encoder sees in each sequence, on the CPU."""
    mark = hashlib.sha256(reflector.feature_digest.encode()).hexdigest()
    folder = run.path("features", mark[:16], "sequence").parent
    keys = [_key(reflector.encoder.shown(s.images), s.instruction) for s in sequences]
    each = dict(zip(keys, sequences, strict=True))  # two that are equal are encoded once
    with progress.bar(len(each), "features") as bar:

        def piece(key: str) -> Seen:
            seen = _seen(reflector, each[key], folder, mark, key)
            bar.advance(1)
            return seen

        with torch.no_grad():
            done = parallel.shared([partial(piece, key) for key in each])
    found = dict(zip(each, done, strict=True))
    return [found[key] for key in keys]


def _key(images: Tensor, instruction: str) -> str:
    """Of the pictures shown `[F, V, H, W, 3]` and the task."""
    key = hashlib.sha256(f"{list(images.shape)} {instruction}".encode())
    key.update(images.numpy().tobytes())
    return key.hexdigest()


def _seen(
    reflector: ImageTextReflector, one: FrameSequence, folder: Path, mark: str, key: str
) -> Seen:
    path = folder / f"{key}.safetensors"
    begin = 1 + derive("late start", key) % (len(one) - 1)  # a sequence has at least two frames
    facts = {"mark": mark, "sequence": key}
    stored = _stored(path, facts, {"whole": len(one), "late": len(one) - begin})
    if stored is None:
        parts = {"whole": one.images, "late": one.images[begin:]}
        stored = {k: reflector.encode(part, one.instruction).cpu() for k, part in parts.items()}
        checkpoint.save(path, stored, facts)
    return Seen(stored["whole"], stored["late"], begin)


def _stored(path: Path, facts: dict, lengths: dict[str, int]) -> dict[str, Tensor] | None:
    """What an earlier call has saved; None where there is nothing, or it is damaged, which is
    said."""
    if not path.exists():
        return None
    try:
        tensors, metadata = checkpoint.load(path)
    except UserError as error:
        print(f"features are computed again: {error}")
        return None
    if metadata == facts and {name: len(tensor) for name, tensor in tensors.items()} == lengths:
        return tensors
    print(f"features are computed again: {path} holds others than its name says")
    return None
