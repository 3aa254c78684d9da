import io
import struct

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.data.decoding import decode, to_rgb


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_rgb_is_left_alone():
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    assert pixels(decode(encoded(image), "x")) == np.asarray(image).tolist()


def test_grey_black_and_white():
    assert pixels(to_rgb(Image.new("L", (1, 1), 77))) == [[[77] * 3]]
    assert pixels(to_rgb(Image.new("1", (1, 1), 1))) == [[[255] * 3]]


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert pixels(decode(encoded(image), "x")) == [[[200, 100, 50], [10, 20, 30]]]


def test_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([1, 0])
    assert pixels(decode(encoded(image, transparency=0), "x")) == [[[200, 100, 50], [255, 255, 255]]]
    assert pixels(decode(encoded(image, "GIF", transparency=0), "x")) == [[[200, 100, 50], [255, 255, 255]]]


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(90, 10, 250, 0), (0, 0, 0, 128), (1, 2, 3, 255)])
    assert pixels(decode(encoded(image), "x")) == [[[255] * 3, [127] * 3, [1, 2, 3]]]
    assert pixels(to_rgb(Image.new("LA", (1, 1), (0, 0)))) == [[[255] * 3]]


def test_colour_key_is_white():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    assert pixels(decode(encoded(image, transparency=(1, 2, 3)), "x")) == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    image = Image.fromarray(np.array([[0, 257, 12850, 65535]], np.uint16))
    assert pixels(decode(encoded(image, kind), "x")) == [[[0] * 3, [1] * 3, [50] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 12850, 65535]], np.int32), [0, 50, 255]),
        (np.array([[-100, 0, 300]], np.int32), [0, 64, 255]),
        (np.array([[0.0, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 51.0, 254.0]], np.float32), [0, 51, 254]),
        (np.array([[0.0, 12850.0, 65535.0]], np.float32), [0, 50, 255]),
        (np.array([[-1.0, 0.0, 3.0]], np.float32), [0, 64, 255]),
    ],
)
def test_32_bit_grey(values, expected):
    image = Image.fromarray(values)
    assert pixels(decode(encoded(image, "TIFF"), "x")) == [[[v] * 3 for v in expected]]


def test_constant_and_nan_floats():
    assert pixels(to_rgb(Image.fromarray(np.full((1, 1), -5.0, np.float32)))) == [[[0] * 3]]
    with pytest.raises(ValueError, match=r"depth\.tif .*finite"):
        decode(Image.fromarray(np.full((1, 1), np.nan, np.float32)), "depth.tif")


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(np.array(pixels(decode(encoded(image, kind), "x"))) - [255, 0, 0]).max() <= 2


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 0), (0, 0, 255)])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright: the left pixel ends on top
    assert pixels(decode(encoded(image, exif=exif), "x")) == [[[255, 0, 0]], [[0, 0, 255]]]


def test_16_bit_grey_with_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.array([[65535, 257]], np.uint16))
    assert pixels(decode(encoded(image, exif=exif), "x")) == [[[255] * 3], [[1] * 3]]


def test_paths_and_images_are_decoded(tmp_path):
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    image.save(tmp_path / "a.png")
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", image):
        assert pixels(decode(source, "x")) == [[[1, 2, 3]]]


def noise(kind: str) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_truncated_image_is_named(kind):
    whole = noise(kind)
    decode(whole, "whole")
    with pytest.raises(ValueError, match=r"photos/cat\.jpg could not be read.*on_bad_image"):
        decode(whole[: len(whole) // 2], "photos/cat.jpg")


@pytest.mark.parametrize("junk", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_corrupted_image_is_named(junk):
    with pytest.raises(ValueError, match=r"cat\.jpg could not be read"):
        decode(junk, "cat.jpg")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cat\.jpg could not be read.*FileNotFound"):
        decode(tmp_path / "no.png", "cat.jpg")


@pytest.mark.parametrize("side", [11, 20])  # above the limit, where PIL only warns, and above twice the limit
def test_a_decompression_bomb_is_refused(monkeypatch, side):
    bomb = encoded(Image.new("RGB", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=rf"bomb\.png was refused: .*{side * side} pixels.*MAX_IMAGE_PIXELS"):
        decode(bomb, "bomb.png")


def test_a_bomb_is_refused_by_its_header_alone(monkeypatch):
    small = bytearray(encoded(Image.new("RGB", (4, 4))))
    small[16:24] = struct.pack(">II", 60000, 60000)
    with pytest.raises(ValueError, match="bomb"):
        decode(bytes(small), "bomb.png")
