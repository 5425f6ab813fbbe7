"""Videos that every browser plays, and the picture of a real rollout beside its imagined twin."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldenv.runtime.errors import UserError, write_error

_INK = (27, 31, 36)
_PAPER = (255, 255, 255)
_QUIET = (120, 128, 140)


def write_video(path: Path | str, frames: np.ndarray, fps: float = 5.0) -> Path:
    """Write frames [T, H, W, 3] uint8 as H.264 (yuv420p), and the last frame beside it as a PNG
    poster.

    Odd sizes lose their last row or column, which the codec demands. Returns the path of the video.
    UserError where ffmpeg or the disk fails, and then no file that is cut short.
    """
    path, frames = Path(path), np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(
            f"{path}: expected frames uint8 [T, H, W, 3] with T >= 1, got {frames.dtype} "
            f"{list(frames.shape)}. Convert the images to 8-bit RGB."
        )
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    draft = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(draft, frames[:, :height, :width], fps)
        draft.replace(path)
        Image.fromarray(frames[len(frames) // 2]).save(path.with_suffix(".png"))
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def _encode(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 by ffmpeg itself: `imageio_ffmpeg.write_frames` does not ask how it ended."""
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    wanted = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20", "-preset", "veryfast"]
    form = ["-movflags", "+faststart", "-f", "mp4", str(path)]
    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
        ended = subprocess.run(
            [program, "-y", "-v", "error", *given, *wanted, *form],
            input=frames.tobytes(),
            capture_output=True,
        )
    except (OSError, RuntimeError) as error:
        raise _no_ffmpeg(path, str(error)) from error
    if ended.returncode or not path.exists():
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"it ended with code {ended.returncode} and no video"
        raise _no_ffmpeg(path, f"{program}: {why}")


def _no_ffmpeg(path: Path, why: str) -> UserError:
    return UserError(
        f"{path.with_suffix('.mp4')}: ffmpeg could not write the video ({why}). It takes a working "
        "ffmpeg, which `pip install --force-reinstall imageio-ffmpeg` brings or "
        "IMAGEIO_FFMPEG_EXE names, and free space on that disk."
    )


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
