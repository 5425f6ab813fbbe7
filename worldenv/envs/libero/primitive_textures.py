"""The few small pictures of the primitive pack, drawn with pillow from fixed seeds.

Liberties: they are not meant to look like LIBERO's photographs, only to give floor, wall, table and
boxes some structure that an encoder can use, at 64-256 pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]


def _noise(size: int, blur: float, seed: int) -> np.ndarray:
    """Smooth noise [size, size] in [-1, 1], seamless at the borders."""
    values = np.random.default_rng(seed).standard_normal((size, size))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    smooth = np.fft.ifft2(np.fft.fft2(values) * np.exp(-((frequency * blur) ** 2))).real
    return smooth / np.abs(smooth).max()


def _shade(colour: Colour, pattern: np.ndarray, depth: float) -> Image.Image:
    """A picture of one colour, made lighter and darker by `pattern` in [-1, 1]."""
    pixels = np.asarray(colour, float) * (1 + depth * pattern[..., None])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def wood(colour: Colour, seed: int, size: int = 128, planks: int = 4) -> Image.Image:
    """Planks with grain along x."""
    rows = np.arange(size)
    grain = _noise(size, 3.0, seed)
    grain = np.stack([np.convolve(np.tile(row, 3), np.ones(31) / 31, "same")[size : 2 * size]
                      for row in grain])  # fmt: skip
    grain = grain / np.abs(grain).max()
    tint = np.random.default_rng(seed).uniform(-0.5, 0.5, planks)[rows * planks // size]
    seam = np.where(rows % (size // planks) == 0, -1.6, 0.0)
    return _shade(colour, 0.6 * grain + tint[:, None] + seam[:, None], 0.10)


def plaster(colour: Colour, seed: int, size: int = 64) -> Image.Image:
    """A wall with faint blotches."""
    return _shade(colour, _noise(size, 12.0, seed), 0.035)


def tiles(colour: Colour, seed: int, size: int = 128, count: int = 4) -> Image.Image:
    """Square floor tiles with darker joints."""
    image = _shade(colour, _noise(size, 6.0, seed), 0.05)
    draw = ImageDraw.Draw(image)
    joint = tuple(int(0.80 * value) for value in colour)
    for place in range(0, size, size // count):
        draw.line([(place, 0), (place, size)], fill=joint, width=2)
        draw.line([(0, place), (size, place)], fill=joint, width=2)
    return image


def cookie_box(size: int = 128) -> Image.Image:
    """The lid of the cookie box: a band and three biscuits on a warm ground."""
    image = Image.new("RGB", (size, size), (226, 118, 38))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, int(0.06 * size), size, int(0.30 * size)], fill=(250, 226, 160))
    draw.rectangle([0, int(0.14 * size), size, int(0.22 * size)], fill=(178, 44, 40))
    for x, y in ((0.27, 0.62), (0.52, 0.72), (0.77, 0.60)):
        radius = 0.14 * size
        box = [x * size - radius, y * size - radius, x * size + radius, y * size + radius]
        draw.ellipse(box, fill=(150, 92, 44), outline=(104, 60, 26), width=2)
        for dx, dy in ((-0.05, -0.04), (0.05, -0.02), (-0.01, 0.06)):
            spot = [(x + dx) * size - 3, (y + dy) * size - 3, (x + dx) * size + 3,
                    (y + dy) * size + 3]  # fmt: skip
            draw.ellipse(spot, fill=(62, 34, 18))
    return image.filter(ImageFilter.GaussianBlur(0.6))


def write_textures(folder: Path) -> None:
    """Writes every texture of the pack as PNG into `folder` (created)."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        # LIBERO puts these two names into the scene by itself.
        "light-gray-floor-tile.png": tiles((168, 172, 176), seed=1),
        "light-gray-plaster.png": plaster((214, 220, 226), seed=2),
        "table.png": wood((198, 164, 124), seed=3, size=256, planks=8),
        "cabinet.png": wood((112, 68, 40), seed=4, planks=2),
        "drawer.png": wood((150, 98, 60), seed=5, planks=1),
        "cookies.png": cookie_box(),
    }
    for name, picture in pictures.items():
        picture.save(folder / name)
