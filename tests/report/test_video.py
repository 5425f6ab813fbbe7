"""Videos decode to what was written, in a format browsers play."""

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from worldenv.report.video import side_by_side, write_video
from worldenv.runtime.errors import UserError


def blocks(frames, height, width):
    video = np.zeros((frames, height, width, 3), np.uint8)
    for t in range(frames):
        video[t, :, : 8 * (t + 1)] = (200, 60, 60)
    return video


@pytest.mark.parametrize("size", [(64, 64), (65, 67)])
def test_video_round_trip(tmp_path, size):
    frames = blocks(6, *size)
    path = write_video(tmp_path / "media" / "x.mp4", frames, fps=5)
    reader = imageio_ffmpeg.read_frames(str(path))
    facts = next(reader)
    assert facts["codec"] == "h264"
    assert facts["pix_fmt"].startswith("yuv420p")
    assert facts["fps"] == 5
    assert facts["size"] == (size[1] // 2 * 2, size[0] // 2 * 2)
    decoded = [np.frombuffer(f, np.uint8).reshape(*facts["size"][::-1], 3) for f in reader]
    assert len(decoded) == 6
    for got, expected in zip(decoded, frames, strict=True):
        cut = expected[: got.shape[0], : got.shape[1]]
        assert np.abs(got.astype(int) - cut).mean() < 8
    assert np.array_equal(np.asarray(Image.open(path.with_suffix(".png"))), frames[3])


def test_bad_frames(tmp_path):
    with pytest.raises(UserError, match=r"uint8 \[T, H, W, 3\] .* got float64"):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3)))
    with pytest.raises(UserError, match="T >= 1"):
        write_video(tmp_path / "x.mp4", np.zeros((0, 8, 8, 3), np.uint8))


def test_side_by_side_places_enlarged_views():
    rng = np.random.default_rng(0)
    real, imagined = (rng.integers(0, 256, (n, 2, 16, 16, 3), dtype=np.uint8) for n in (3, 5))
    video = side_by_side(real, imagined, scale=4, notes=(["a"] * 3, ["R = 0.1"] * 5))
    bar = 20
    assert video.shape == (5, 128 + 2 * bar, 64 + 8 + 64, 3)
    left, right = video[:, bar : bar + 128, :64], video[:, bar : bar + 128, 72:]
    assert np.array_equal(left[1, 2:64:4, 1::4], real[1, 0])
    assert np.array_equal(left[2, 64::4, ::4], real[2, 1])
    assert np.array_equal(right[4, 64::4, ::4], imagined[4, 1])
    # The real one has ended: its last frame stays, paler.
    assert np.array_equal(left[4, 64::4, ::4], real[2, 1] // 2 + 127)
    single = side_by_side(real[:, 0], imagined[:, 0], scale=2)
    assert single.shape == (5, 32 + bar, 32 + 8 + 32, 3)
    with pytest.raises(UserError, match="one image size"):
        side_by_side(real, imagined[..., :8, :8, :])


BROKEN = {
    "absent": None,
    "fails at once": "#!/bin/sh\necho no codec here >&2\nexit 3\n",
    "fails at the end": "#!/bin/sh\ncat >/dev/null\necho No space left on device >&2\nexit 1\n",
    "writes nothing": "#!/bin/sh\ncat >/dev/null\n",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_ffmpeg_is_named_and_leaves_no_file(tmp_path, monkeypatch, how):
    program = tmp_path / "ffmpeg"
    if BROKEN[how]:
        program.write_text(BROKEN[how])
        program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(UserError, match=r"x\.mp4: ffmpeg could not .*IMAGEIO_FFMPEG_EXE") as caught:
        write_video(tmp_path / "media" / "x.mp4", blocks(40, 256, 256))
    assert str(program) in str(caught.value)
    assert list((tmp_path / "media").iterdir()) == []


def test_a_video_cut_short_by_a_full_disk_is_not_kept(tmp_path, largest_file):
    frames = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), np.uint8)
    with largest_file(20_000), pytest.raises(UserError, match="could not write the video"):
        write_video(tmp_path / "x.mp4", frames)
    assert list(tmp_path.iterdir()) == []
    assert write_video(tmp_path / "x.mp4", frames).stat().st_size > 20_000
