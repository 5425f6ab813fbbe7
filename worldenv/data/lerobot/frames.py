"""Frames of a video by their timestamps, decoded by ffmpeg one after the other as they are asked
for.

ffmpeg says the time of every frame it gives (its filter `showinfo`), and each is held against the
time it is asked for: a frame too many, too few or at another rate is an error, never another
picture. `Cameras` keeps a decoder open while episodes follow each other in a file, so that going
through a data set in order costs one seek a file; the cameras' decoders run beside each other.
"""

from __future__ import annotations

import fcntl
import io
import math
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
from PIL import Image

from worldenv.data.lerobot.layout import DataSet
from worldenv.data.lerobot.tables import unreadable
from worldenv.runtime.errors import UserError

TOLERANCE = 1e-4  # s, LeRobot's own
_BASE = re.compile(rb"config in time_base: (\d+)/(\d+)")
_FRAME = re.compile(rb" n: *\d+ pts: *(-?\d+|NOPTS) .*? s:(\d+)x(\d+) ")
_PIPE = 1 << 20  # bytes that ffmpeg may be ahead


class Decoder:
    """One video from a moment on."""

    def __init__(self, path: Path, start: float, fps: float, side: tuple[int, int]) -> None:
        """start: s of the first frame wanted; fps: of the video; side: (H, W) it must have."""
        self.path, self.fps, self.side, self.next = path, fps, side, start
        if not path.is_file():
            raise unreadable(path, "a video", "")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as ffmpeg
        self._place, self._rest, self._base = 0, b"", 0.0
        self._times: list[float] = []
        seek = ["-ss", f"{start - 0.5 / fps:.6f}"] if start > 0.5 / fps else []
        command = [
            *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-nostats", "-hide_banner"),
            *("-loglevel", "repeat+info", "-xerror", "-err_detect", "explode", "-threads", "1"),
            *seek, "-copyts", "-i", str(path.absolute()),
            *("-map", "0:v:0", "-vf", "showinfo=checksum=0"),
            *("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._said, bufsize=0
        )
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)

    def read(self, frames: np.ndarray, where: str) -> None:
        """Fill frames [F, H, W, 3] uint8 with the next ones. where: whose they are, for
        messages.
        """
        count = len(frames)
        rest, got = memoryview(frames.reshape(-1)), 0
        while got < len(rest):
            more = self._process.stdout.readinto(rest[got : got + _PIPE])
            if not more:
                break
            got += more
        self._listen()
        whole = min(got // frames[0].size, len(self._times))
        wanted = self.next + np.arange(count) / self.fps
        times = np.array(self._times[:whole])
        off = np.flatnonzero(~(np.abs(times - wanted[:whole]) <= TOLERANCE))
        if len(off):
            raise self._off(times, wanted, int(off[0]), where)
        if whole < count:
            words = f"{count} frames of {where} from {self.next:.4f} s on"
            raise unreadable(self.path, words, f"{whole} of them, then {self._last_words()}")
        del self._times[:count]
        self.next = float(wanted[-1] + 1 / self.fps)

    def close(self) -> None:
        """End ffmpeg. Calling it twice does no harm."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _listen(self) -> None:
        """Take in what ffmpeg said of frames since the last time."""
        while more := os.pread(self._said.fileno(), _PIPE, self._place):
            self._place += len(more)
            self._rest += more
        whole, _, self._rest = self._rest.rpartition(b"\n")
        if not self._base and (found := _BASE.search(whole)):
            self._base = int(found[1]) / int(found[2])
        for match in _FRAME.finditer(whole):
            side = int(match[3]), int(match[2])
            if side != self.side:
                raise UserError(
                    f"{self.path}: expected pictures of {self.side[0]}x{self.side[1]}, as "
                    f"meta/info.json says, got {side[0]}x{side[1]}. One of them is of another data "
                    "set: download it again, whole."
                )
            self._times.append(math.nan if match[1] == b"NOPTS" else int(match[1]) * self._base)

    def _off(self, times: np.ndarray, wanted: np.ndarray, k: int, where: str) -> UserError:
        rate = 1 / np.median(np.diff(times)) if len(times) > 1 else math.nan
        return UserError(
            f"{self.path}: frame {k} of {where}: expected it at {wanted[k]:.4f} s, by "
            f"{self.fps:g} frames a second (fps in meta/info.json), got {times[k]:.4f} s, of a "
            f"video at {rate:.4g}. Give info.json the rate of its videos, or download both again."
        )

    def _last_words(self) -> str:
        """How ffmpeg ended: the last thing it complained of."""
        self._process.stdout.close()
        code = self._process.wait()
        said = os.pread(self._said.fileno(), 4096, max(self._place - 4096, 0))
        lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
        errors = [s for s in lines if re.search("rror|nvalid|not found|orrupt|artial|nable", s)]
        return f"ffmpeg ended with {code}: {errors[-1] if errors else 'the video is over'}"


class Cameras:
    """Frames of a data set's episodes, from videos and from pictures in its tables.

    Use as a context manager.
    """

    def __init__(self, dataset: DataSet, cameras: tuple[str, ...]) -> None:
        self.dataset, self.cameras = dataset, cameras
        self._open: dict[str, Decoder] = {}
        self._threads = ThreadPoolExecutor(len(cameras))

    def frames(self, episode: int, rows: pa.Table) -> np.ndarray:
        """[F, V, H, W, 3] uint8 of the episode in place `episode`; rows: of its table."""
        sides = {self.dataset.features[camera].shape[:2] for camera in self.cameras}
        if len(sides) > 1:
            raise UserError(
                f"{self.dataset.folder}: {', '.join(self.cameras)}: expected pictures of one size, "
                f"got {' and '.join(str(list(side)) for side in sorted(sides))}. Name cameras that "
                "are alike (--data.cameras), or convert the data set to one size."
            )
        shape = len(self.cameras), len(rows), *sides.pop(), 3
        views = np.empty(shape, np.uint8)
        # A decoder that is not read from waits: all at once.
        work = partial(self._view, episode=episode, rows=rows)
        for _ in self._threads.map(work, self.cameras, views):
            pass
        return views.swapaxes(0, 1)

    def _view(self, camera: str, out: np.ndarray, episode: int, rows: pa.Table) -> None:
        data, feature = self.dataset, self.dataset.features[camera]
        side = feature.shape[0], feature.shape[1]
        if feature.dtype == "image":
            return _pictures(rows, camera, out, data.data_file(episode))
        path, start = data.video_file(camera, episode), float(data.start[camera][episode])
        decoder = self._open.get(camera)
        if decoder is None or decoder.path != path or abs(decoder.next - start) > TOLERANCE:
            self._drop(camera)
            decoder = self._open[camera] = Decoder(path, start, data.fps, side)
        decoder.next = start  # no rounding adds up
        where = f"{camera}, episode {data.number[episode]}"
        decoder.read(out, where)

    def _drop(self, camera: str) -> None:
        if camera in self._open:
            self._open.pop(camera).close()

    def __enter__(self) -> Cameras:
        return self

    def __exit__(self, *_: object) -> None:
        for camera in list(self._open):
            self._drop(camera)
        self._threads.shutdown()


def _pictures(rows: pa.Table, camera: str, frames: np.ndarray, path: Path) -> None:
    """Fill frames [F, H, W, 3] uint8 with pictures that lie in a table as PNG or JPEG."""
    if camera not in rows.column_names:
        raise unreadable(path, f"a column {camera}", f"only {', '.join(rows.column_names)}")
    for k, cell in enumerate(rows.column(camera).to_pylist()):
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        where = f"a picture {frames.shape[1]}x{frames.shape[2]} in row {k} of {camera}"
        if not isinstance(content, bytes):
            raise unreadable(path, where, "none is embedded")
        try:
            picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise unreadable(path, where, str(error)) from error
        if picture.shape != frames.shape[1:]:
            raise unreadable(path, where, f"one of {list(picture.shape)}")
        frames[k] = picture
