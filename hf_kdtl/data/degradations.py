"""Images as they come in use: noisy, blurred, compressed, badly lit, small, half hidden; at five severities.

docs/degradations.md has the table of severities, which `severity_table` makes, and a picture, which
hf_kdtl.reports.figures.degradation_gallery draws.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kornia.enhance import adjust_brightness, adjust_contrast_with_mean_subtraction
from kornia.filters import filter2d, gaussian_blur2d
from PIL import Image
from torch import Tensor

from hf_kdtl.functional.random import Draws
from hf_kdtl.functional.resample import precise
from hf_kdtl.utils.options import check_known

SEVERITIES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Degradation:
    """A change of pixels at five severities. Called with (pixels, severity, images):

        pixels: (B, 3, h, w) floats in [0, 1], before normalisation. The result has the same shape, range and dtype,
            and carries no gradient.
        severity: 1 to 5.
        images: (B,) the index of each image in its data set. What is random (noise, places, directions) is drawn from
            (name, severity, index) and nothing else: the same for every model, batch size, order and device.

    What happens to an image does not depend on the others of its batch.

    Args:
        name: of the degradation.
        what: it does, in a line.
        unit: of `amounts`.
        amounts: of severity 1 to 5.
        change: (pixels at least float32, amount, draws) -> pixels; clipped to [0, 1] afterwards.

    Cost: below a millisecond an image of 32 px; of 224 px 0.3 to 3 ms, and 15 to 25 ms for the blurs (one core).

    Raises:
        ValueError: for another severity, pixels of another shape or type or outside [0, 1], or `images` of another
            number.
    """

    name: str
    what: str
    unit: str
    amounts: tuple[float, float, float, float, float]
    change: Callable[[Tensor, float, Draws], Tensor]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, severity: int, images: Sequence[int]) -> Tensor:
        self.check(severity)
        _check_pixels(self.name, pixels, images)
        draws = Draws(0, severity, tuple(int(index) for index in images))
        changed = self.change(precise(pixels), self.amounts[severity - 1], draws)
        return changed.clamp(0, 1).to(pixels.dtype)

    def check(self, severity: Any) -> None:
        """Raises ValueError unless the severity is one of 1 to 5."""
        if type(severity) is not int or severity not in SEVERITIES:
            raise ValueError(
                f"{self.name} at severity {severity!r}; expected a whole number from 1 to 5. The image as it is has "
                "no severity: use the data itself."
            )


def gaussian_noise(pixels: Tensor, std: float, draws: Draws) -> Tensor:
    """x + std n, n ~ N(0, 1) for each pixel and channel."""
    return pixels + std * draws.normal(tuple(pixels.shape[1:]), "gaussian_noise", pixels)


def impulse_noise(pixels: Tensor, share: float, draws: Draws) -> Tensor:
    """That share of the pixels, in the mean, is black or white with equal chance, in all channels."""
    drawn = draws.uniform((1, *pixels.shape[-2:]), "impulse_noise", pixels)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn >= 1 - share / 2, 1.0, pixels))


def gaussian_blur(pixels: Tensor, fraction: float, draws: Draws) -> Tensor:
    """Convolved with a Gaussian of sigma = fraction x shorter side, cut at 4 sigma; the edge pixels are repeated."""
    sigma = fraction * min(pixels.shape[-2:])
    size = 2 * math.ceil(4 * sigma) + 1
    return gaussian_blur2d(pixels, (size, size), (sigma, sigma), border_type="replicate")


def motion_blur(pixels: Tensor, fraction: float, draws: Draws) -> Tensor:
    """The mean over a straight move of length fraction x shorter side, centred, in a direction of the image's own.

    Over points a tenth of a pixel apart or less, each read bilinearly; so a move of 1.3 px is not one of 1 or 3.
    """
    length = fraction * min(pixels.shape[-2:])
    angle = torch.pi * draws.uniform((), "motion_blur", pixels)
    along = torch.linspace(-length / 2, length / 2, math.ceil(10 * length) + 1).to(pixels)
    radius = math.ceil(length / 2)
    places = torch.arange(-radius, radius + 1).to(pixels)

    def near(points: Tensor) -> Tensor:  # (B, points, size): bilinear weight of each place
        return (1 - (points[:, :, None] - places).abs()).clamp(min=0)

    rows, columns = (near(way(angle)[:, None] * along) for way in (torch.sin, torch.cos))
    kernels = rows.transpose(1, 2) @ columns / len(along)
    return filter2d(pixels, kernels, border_type="replicate")


def jpeg(pixels: Tensor, quality: float, draws: Draws) -> Tensor:
    """Through a JPEG file of that quality, colours at half the resolution, written and read by Pillow.

    A file and not kornia's differentiable codec, whose softened rounding changes an image 5 to 9 % less.
    """
    files = []
    for image in pixels:
        _to_image(image).save(file := io.BytesIO(), "jpeg", quality=int(quality), subsampling="4:2:0")
        with Image.open(file) as read:
            files.append(_to_pixels(read))
    return torch.cat(files).to(pixels)


def contrast(pixels: Tensor, factor: float, draws: Draws) -> Tensor:
    """m + factor (x - m), m the mean of the image's luminance: paler towards one grey."""
    return adjust_contrast_with_mean_subtraction(pixels, factor)


def brightness(pixels: Tensor, shift: float, draws: Draws) -> Tensor:
    """x + shift or x - shift, clipped: over- or under-exposed, by the image's own draw."""
    return adjust_brightness(pixels, shift * draws.rademacher((), "brightness", pixels))


def downscale(pixels: Tensor, fraction: float, draws: Draws) -> Tensor:
    """Scaled down to that fraction of each side (antialiased), and back up; both bilinear.

    In shares of the image's own pixels, so more is left of a large image than of a small one.
    """
    size = tuple(pixels.shape[-2:])
    small = tuple(max(1, round(fraction * side)) for side in size)
    smaller = F.interpolate(pixels, size=small, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(smaller, size=size, mode="bilinear", align_corners=False)


def occlusion(pixels: Tensor, share: float, draws: Draws) -> Tensor:
    """A grey (0.5) rectangle with the image's aspect ratio hides that share of the area, uncropped, anywhere."""
    result = pixels.clone()
    sides = [max(1, round(share**0.5 * side)) for side in pixels.shape[-2:]]
    drawn = draws.uniform((2,), "occlusion", pixels).tolist()
    for image, places in zip(result, drawn, strict=True):
        starts = [int(u * (n - side + 1)) for u, n, side in zip(places, pixels.shape[-2:], sides, strict=True)]
        image[:, starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]] = 0.5
    return result


_ALL = (
    (
        gaussian_noise,
        "random noise on every pixel",
        "standard deviation; the range is 1",
        (0.04, 0.07, 0.1, 0.15, 0.2),
    ),
    (impulse_noise, "pixels that are black or white", "share of the pixels", (0.01, 0.02, 0.04, 0.08, 0.15)),
    (gaussian_blur, "out of focus", "sigma, in shorter sides", (0.01, 0.015, 0.02, 0.03, 0.04)),
    (motion_blur, "a straight move, any direction", "length, in shorter sides", (0.04, 0.06, 0.09, 0.13, 0.18)),
    (jpeg, "compressed (blocks are 8 px at any size)", "JPEG quality, of 100", (60, 35, 20, 12, 7)),
    (contrast, "paler, towards the mean grey", "factor on the contrast", (0.75, 0.6, 0.45, 0.3, 0.2)),
    (brightness, "too bright or too dark, by image", "shift; the range is 1", (0.1, 0.2, 0.3, 0.4, 0.5)),
    (downscale, "scaled down and up again", "side that is left", (0.85, 0.65, 0.45, 0.3, 0.2)),
    (occlusion, "a grey rectangle, anywhere", "share of the area", (0.05, 0.1, 0.2, 0.3, 0.45)),
)
DEGRADATIONS = {f.__name__: Degradation(f.__name__, what, unit, amounts, f) for f, what, unit, amounts in _ALL}


def degradation(name: str) -> Degradation:
    """One of DEGRADATIONS, by name. Raises ValueError for another name, with the closest."""
    check_known("degradation", name, DEGRADATIONS)
    return DEGRADATIONS[name]


def degrade_image(image: Image.Image, name: str, severity: int, index: int) -> Image.Image:
    """One 8-bit RGB image, degraded and rounded to 8 bits again. Arguments and errors as of `Degradation`."""
    return _to_image(degradation(name)(_to_pixels(image), severity, (index,))[0])


def severity_table() -> str:
    """Markdown: one row a degradation, with its amounts at the five severities."""
    lines = ["| degradation | what it is | amount | 1 | 2 | 3 | 4 | 5 |", "| --- " * 8 + "|"]
    for one in DEGRADATIONS.values():
        lines.append(f"| `{one.name}` | {one.what} | {one.unit} | {' | '.join(f'{a:g}' for a in one.amounts)} |")
    return "\n".join(lines)


def _to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).cpu().numpy())


def _check_pixels(name: str, pixels: Tensor, images: Sequence[int]) -> None:
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel() or not pixels.is_floating_point():
        raise ValueError(
            f"{name}: found pixels of shape {tuple(pixels.shape)} and {pixels.dtype}; expected (B, 3, h, w) floats in "
            "[0, 1]. Divide 8-bit pixels by 255."
        )
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"{name}: pixels lie in [{low:.4g}, {high:.4g}]; expected [0, 1]. Degrade first, normalise afterwards."
        )
    if len(images) != len(pixels):
        raise ValueError(f"{name}: {len(pixels)} images and {len(images)} indices; expected one index for each image.")
