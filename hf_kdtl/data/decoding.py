"""From the bytes of an image file to 8-bit RGB, as transformers' pipelines read it; an unreadable file is named."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from hf_kdtl.utils.text import one_line

_ORIENTATION = 0x0112  # EXIF
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height."""
HEIF_MISSING = 'HEIC files, which need pillow-heif (pip install "hf_kdtl[heif]")'
AVIF_MISSING = "AVIF files, which this Pillow cannot read (pip install -U pillow)"
_AVIF = (b"avif", b"avis")
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied (width and height may swap)."""
    # The tag is looked up first because exif_transpose copies the image even where there is nothing to turn.
    if orientation(image) != 1:
        return ImageOps.exif_transpose(image)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: the pixels that `pipeline("image-classification")` shows a model.

    That is `ImageOps.exif_transpose(image).convert("RGB")`, the first frame of an animation. It drops transparency
    (the color stored under a transparent pixel appears) and clips 16-bit, 32-bit and float values to [0, 255]:
    `hf_kdtl.data.bit_depth` warns about those, and can scale them.

    Raises:
        ValueError: when Pillow knows no conversion.
    """
    image = upright(image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def open_image(source: bytes | str | Path) -> Image.Image:
    """The image file, lazily: its header is read, its pixels are not. HEIC and AVIF where a reader is installed."""
    register_heif()
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


@cache
def register_heif() -> bool:
    """Whether Pillow can open HEIC: registers pillow-heif where it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def missing_reader(source: bytes | str | Path) -> str:
    """Which kind of file that no reader here opens this is, by its first bytes; empty where it is of no such kind."""
    if not isinstance(source, bytes):
        try:
            with open(source, "rb") as file:
                source = file.read(12)
        except OSError:
            return ""
    brand = source[8:12] if source[4:8] == b"ftyp" else b""
    if brand in _HEIF and not register_heif():
        return HEIF_MISSING
    return AVIF_MISSING if brand in _AVIF and "AVIF" not in Image.OPEN else ""


def orientation(image: Image.Image) -> int:
    """By EXIF; 1 is upright."""
    return image.getexif().get(_ORIENTATION, 1)


def to_reduced_rgb(image: Image.Image, factor: int) -> Image.Image:
    """As `to_rgb`, at 1/factor of the width and height, rounded up: a JPEG, which then is decoded in less time.

    Args:
        image: opened, not read yet, and not turned where the factor is above 1.
        factor: 1, 2, 4 or 8.
    """
    if factor > 1:  # asked for rounded down: by the size rounded up, Pillow decodes all of it without a word
        image.draft(None, (image.width // factor, image.height // factor))
    return to_rgb(image)


def decode(source: bytes | str | Path | Image.Image, name: str, read: Callable[[Image.Image], Any] = to_rgb) -> Any:
    """Read an image (the bytes of a file, a path, or an opened PIL image) as 8-bit RGB; `name` is for the errors.

    Args:
        read: what to make of the opened image, instead.

    Raises:
        ValueError: when the image is corrupted, truncated or missing, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`, where PIL itself only warns up to twice as many.
    """
    name = one_line(name)  # a file's name may hold anything, and the error is printed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return read(source)
            with open_image(source) as image:
                return read(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} was refused: {error} Expected a photograph: scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS "
            "if you trust the file."
        ) from error
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error, ... for what is not an image
        if not isinstance(source, Image.Image) and (kind := missing_reader(source)):
            raise ValueError(
                f"{name} could not be read, like all {kind}. Install that, convert these files, or load with "
                'on_bad_image="skip" (--on_bad_image skip).'
            ) from error
        raise ValueError(
            f"{name} could not be read as an image ({type(error).__name__}: {error}). Expected a complete image file "
            'that PIL opens; repair or remove it, or load with on_bad_image="skip" (--on_bad_image skip).'
        ) from error


def decode_row(image: dict[str, Any], index: int, count: int, read: Callable[[Image.Image], Any] = to_rgb) -> Any:
    """`decode` for a cell of an image column; an image without a path is named by its index."""
    name = image["path"] or f"Image {index} of the split of {count} images"
    return decode(image["bytes"] or image["path"], name, read)
