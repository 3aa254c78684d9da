import io
import struct

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

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


def served(image) -> list:
    """What a pipeline makes of an image before the image processor, or the type of its error."""
    try:
        return np.asarray(load_image(image)).tolist()
    except Exception as error:
        return [type(error).__name__]


def ours(image) -> list:
    try:
        return pixels(to_rgb(image))
    except Exception as error:
        return [type(error).__name__]


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
HIGH_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_as_a_pipeline_reads_it(mode):
    colors = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8), "RGBA")
    image = Image.frombytes(mode, (5, 6), colors.tobytes()[: len(Image.new(mode, (5, 6)).tobytes())])
    if mode == "P":
        image.putpalette(list(np.random.default_rng(1).integers(0, 256, 768)))
    assert ours(image) == served(image)
    if mode not in ("P", "PA"):  # transparency is dropped, in whatever form it comes
        image.info["transparency"] = 0 if mode in ("1", "L") else (0, 0, 0)
        assert ours(image) == served(image)


@pytest.mark.parametrize("mode", HIGH_MODES)
def test_every_mode_of_more_than_8_bits_is_read_as_a_pipeline_reads_it(mode):
    values = np.array([[0, 100, 255, 256, 4095, 40000]])
    image = {
        "I": lambda: Image.fromarray(values.astype(np.int32)),
        "F": lambda: Image.fromarray((values - 50.3).astype(np.float32)),
    }.get(mode, lambda: Image.frombytes(mode, (6, 1), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()))()
    assert ours(image) == served(image)


def test_transparency_of_files_is_dropped_as_a_pipeline_drops_it(tmp_path):
    cut_out = Image.new("RGBA", (3, 1))
    cut_out.putdata([(90, 10, 250, 0), (0, 0, 0, 128), (1, 2, 3, 255)])
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([1, 0, 1])
    keyed = Image.new("RGB", (3, 1), (1, 2, 3))
    files = {
        "a.png": encoded(cut_out),
        "p.png": encoded(palette, transparency=0),
        "p.gif": encoded(palette, "GIF", transparency=0),
        "k.png": encoded(keyed, transparency=(1, 2, 3)),
        "la.png": encoded(cut_out.convert("LA")),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert pixels(decode(content, name)) == served(str(tmp_path / name)), name
    assert pixels(decode(files["a.png"], "a.png"))[0][0] == [90, 10, 250]


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


def test_paths_and_images_are_decoded(tmp_path):
    image = Image.new("RGB", (1, 1), (1, 2, 3))
    image.save(tmp_path / "a.png")
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", image):
        assert pixels(decode(source, "x")) == [[[1, 2, 3]]]


def noise(kind: str) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_truncated_image_is_named(kind):
    full = noise(kind)
    decode(full, "full")
    with pytest.raises(ValueError, match=r"photos/cat\.jpg could not be read.*on_bad_image"):
        decode(full[: len(full) // 2], "photos/cat.jpg")


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


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0"


def test_a_file_that_needs_another_reader_says_which(tmp_path, monkeypatch):
    """Also under another name: phones call HEIC files .jpg."""
    monkeypatch.setattr("hf_kdtl.data.decoding.register_heif", lambda: False)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (tmp_path / "a.jpg").write_bytes(HEIC)
    for source in (HEIC, tmp_path / "a.jpg"):
        with pytest.raises(ValueError, match=r'a.jpg could not be read, like all HEIC.*pip install "hf_kdtl\[heif\]"'):
            decode(source, "a.jpg")
    with pytest.raises(ValueError, match="like all AVIF files, which this Pillow cannot read"):
        decode(HEIC.replace(b"heic", b"avif"), "a.avif")
    with pytest.raises(ValueError, match="Expected a complete image file"):
        decode(b"\0\0\0\x18ftypmp42", "a.mp4")
