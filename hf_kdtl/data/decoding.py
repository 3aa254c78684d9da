"""From the bytes of an image file to 8-bit RGB, whatever the file holds; a file that cannot be read is named."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hf_kdtl.utils.text import one_line

_HIGH_RANGE = ("I", "F")  # and the "I;16" family: the modes of more than 8 bits, which PIL's convert() would clip


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, as a viewer would show it; the first frame of an animation.

    - EXIF orientation is applied (width and height may swap).
    - Transparent pixels (RGBA, LA, a palette or a colour key) are composited on white: what a page shows behind a cut
      out photograph. The colour stored under a fully transparent pixel is arbitrary and never appears.
    - 16-bit grey is divided by 257, so that 65535 becomes 255. 32-bit integers ("I") count as 16-bit values. Floats
      ("F") are taken to span [0, 1], [0, 255] or [0, 65535]: the smallest that holds them. Values outside all of these
      (negative ones, too) are stretched from their own minimum and maximum to [0, 255].
    - Palette, 8-bit grey, black and white, CMYK, YCbCr: PIL's conversion.

    Raises:
        ValueError: when a float image holds nan or infinity, or PIL knows no conversion.
    """
    # The tag is looked up first because exif_transpose copies the image even where there is nothing to turn.
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in _HIGH_RANGE or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(source: bytes | str | Path | Image.Image, name: str) -> Image.Image:
    """Read an image (the bytes of a file, a path, or an opened PIL image) as 8-bit RGB; `name` is for the errors.

    Raises:
        ValueError: when the image is corrupted, truncated or missing, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`, where PIL itself only warns up to twice as many.
    """
    name = one_line(name)  # a file's name may hold anything, and the error is printed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return to_rgb(source)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} was refused: {error} Expected a photograph: scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS "
            "if you trust the file."
        ) from error
    except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error, ... for what is not an image
        raise ValueError(
            f"{name} could not be read as an image ({type(error).__name__}: {error}). Expected a whole image file "
            'that PIL opens; mend or remove it, or load with on_bad_image="skip" (--on_bad_image skip).'
        ) from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"its pixels range from {low} to {high}, expected finite values")
    scales = (1, 255, 65535) if image.mode == "F" else (65535,)
    fitting = [scale for scale in scales if low >= 0 and high <= scale]
    if fitting:
        low, high = 0, fitting[0]
    grey = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 256):  # in strips: as float64 at once, a file of some kB could take gigabytes
        strip = slice(top, top + 256)
        grey[strip] = np.rint((values[strip].astype(np.float64) - low) * (255 / (high - low or 1)))
    return Image.fromarray(grey)
