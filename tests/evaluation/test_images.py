"""Images as files: one rounding, every kind of file that a folder of real images holds."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import images


def test_a_png_holds_the_nearest_of_256_levels(tmp_path):
    image = torch.rand(3, 7, 5)
    image[0, 0, :4] = torch.tensor([-1.0, 2.0, float("nan"), float("inf")])
    (tmp_path / "a.png").write_bytes(images.png(image))
    (found,) = images.read([tmp_path / "a.png"])
    assert found[0, 0, :4].tolist() == [0, 1, 0, 1]
    assert (found - image)[1:].abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(images.to_8_bits(image).float() / 255, found)


def test_gray_levels_of_16_bits_are_scaled(tmp_path):
    """Cases B.8: Pillow clips them at 255, so that everything is white."""
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    (found,) = images.read([tmp_path / "a.png"])
    assert (found * 255).round()[:, 0].tolist() == [[0, 1, 128, 255]] * 3
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UsageError, match="floating-point gray levels"):
        images.read([tmp_path / "a.tiff"])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white(mode, tmp_path):
    """What a viewer shows, not the color that an editor left under them."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "a.png")
    (found,) = images.read([tmp_path / "a.png"])
    assert found[:, 0, 0].tolist() == [0, 0, 0]
    assert found[:, 3, 3].tolist() == [1, 1, 1]


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_one_sentence(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.png cannot be read as an image"):
        images.read([tmp_path / "a.png"])
    whole = images.png(torch.rand(3, 64, 64))
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.png cannot be read as an image"):
        images.read([tmp_path / "a.png"])


def test_a_square_is_cut_from_the_center(tmp_path):
    Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (20, 1))).save(tmp_path / "a.png")
    (found,) = images.read([tmp_path / "a.png"], square=20)
    assert (found[0, 0] * 255).round().tolist() == list(range(10, 30))
    Image.new("RGB", (20, 20)).save(tmp_path / "b.png")
    with pytest.raises(UsageError, match="another size"):
        images.read([tmp_path / "a.png", tmp_path / "b.png"])


def test_only_visible_image_files_count(tmp_path):
    """Cases B.8: copies in hidden folders; and no pipe is ever opened."""
    for name in ("a.png", "deep/b.JPG", ".thumbnails/a.png", "deep/.ipynb_checkpoints/b.png", "._a.png", "notes.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file, "PNG")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in images.find(tmp_path)] == ["a.png", "deep/b.JPG"]


def test_a_grid_on_white():
    tiles = [Image.new("RGB", (3, 5), "black")] * 3
    grid = np.asarray(images.grid(tiles, columns=2, gap=1))
    assert grid.shape == (11, 7, 3)
    assert (grid[:5, :3] == 0).all()
    assert (grid[:, 3] == 255).all()
    assert (grid[6:, 4:] == 255).all()


def test_a_photo_is_upright_as_a_viewer_shows_it(tmp_path):
    image = Image.new("RGB", (8, 16))
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: shown turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    (found,) = images.read([tmp_path / "a.jpg"])
    assert found.shape == (3, 8, 16)
    assert found[:, :, 9:].mean() > 0.95
    assert found[:, :, :7].mean() < 0.05


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".TIFF", ".jfif", ".gif", ".ppm", ".avif"])
def test_other_formats_of_real_images_count(suffix, tmp_path):
    """A folder of two PNGs and a thousand TIFFs was two images, without a word."""
    form = {".jfif": "JPEG", ".tif": "TIFF"}.get(suffix.lower(), suffix[1:].upper())
    Image.new("RGB", (4, 4), "white").save(tmp_path / f"a{suffix}", form)
    assert images.find(tmp_path) == [tmp_path / f"a{suffix}"]
    assert images.read(images.find(tmp_path)).mean() > 0.99


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tif"])
def test_several_frames_are_no_image(suffix, tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("white", "black")]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(UsageError, match="holds 2 frames: give single images"):
        images.read([tmp_path / f"a{suffix}"])


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "P"])
def test_every_color_mode_is_white_where_it_is_white(mode, tmp_path):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    image.save(tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"))
    (found,) = images.read(images.find(tmp_path))
    assert found.shape == (3, 4, 4)
    assert found.mean() > 0.98
