"""Videos that every browser plays, and the picture of a real rollout beside its imagined twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldenv.runtime.errors import UserError

_INK = (27, 31, 36)
_PAPER = (255, 255, 255)
_QUIET = (120, 128, 140)


def write_video(path: Path | str, frames: np.ndarray, fps: float = 5.0) -> Path:
    """Write frames [T, H, W, 3] uint8 as H.264 (yuv420p), and the last frame beside it as a PNG
    poster.

    Odd sizes lose their last row or column, which the codec demands. Returns the path of the video.
    """
    path, frames = Path(path), np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(
            f"{path}: expected frames uint8 [T, H, W, 3] with T >= 1, got {frames.dtype} "
            f"{list(frames.shape)}. Convert the images to 8-bit RGB."
        )
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        macro_block_size=2,
        ffmpeg_log_level="error",
        output_params=["-crf", "20", "-preset", "veryfast", "-movflags", "+faststart"],
    )
    writer.send(None)
    try:
        for frame in frames:
            writer.send(np.ascontiguousarray(frame[:height, :width]))
    finally:
        writer.close()
    Image.fromarray(frames[len(frames) // 2]).save(path.with_suffix(".png"))
    return path


def side_by_side(
    real: np.ndarray,
    imagined: np.ndarray,
    *,
    scale: int = 4,
    captions: tuple[str, str] = ("real", "imagined"),
    notes: tuple[Sequence[str], Sequence[str]] | None = None,
) -> np.ndarray:
    """Two rollouts next to each other: [T, V, H, W, 3] or [T, H, W, 3] uint8 each -> [T', H', W',
    3].

    Views lie one above the other, pixels are enlarged without smoothing, captions stand on top and
    one line of `notes` per frame below. The shorter rollout holds its last frame, greyed.
    """
    columns = []
    length = max(len(real), len(imagined))
    for side, rollout in enumerate((real, imagined)):
        rollout = np.asarray(rollout)
        views = rollout if rollout.ndim == 5 else rollout[:, None]
        tall = np.concatenate(list(views.swapaxes(0, 1)), axis=1)
        tall = tall.repeat(scale, axis=1).repeat(scale, axis=2)
        pictures = [
            _framed(
                tall[min(t, len(tall) - 1)],
                captions[side],
                None if notes is None else notes[side][min(t, len(notes[side]) - 1)],
                over=t >= len(tall),
            )
            for t in range(length)
        ]
        columns.append(np.stack(pictures))
    if columns[0].shape != columns[1].shape:
        raise UserError(
            f"expected rollouts of one image size, got {list(np.shape(real))} and "
            f"{list(np.shape(imagined))}. Resize one of them first."
        )
    gap = np.full((length, columns[0].shape[1], 8, 3), 255, np.uint8)
    joined = np.concatenate([columns[0], gap, columns[1]], axis=2)
    return joined[:, : joined.shape[1] // 2 * 2, : joined.shape[2] // 2 * 2]


def _framed(picture: np.ndarray, caption: str, note: str | None, *, over: bool) -> np.ndarray:
    """One picture [H, W, 3] with a caption bar above and, for a note, one below."""
    height, width = picture.shape[:2]
    bar = max(20, width // 8)
    if over:
        # The rollout has ended: halfway to white.
        picture = (picture // 2 + 127).astype(np.uint8)
    canvas = Image.new("RGB", (width, height + bar * (1 if note is None else 2)), _PAPER)
    canvas.paste(Image.fromarray(picture), (0, bar))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=bar * 0.62)
    draw.text((2, bar / 2), caption + (" (ended)" if over else ""), _INK, font, anchor="lm")
    if note is not None:
        draw.text((2, bar * 1.5 + height), note, _QUIET, font, anchor="lm")
    return np.asarray(canvas)
