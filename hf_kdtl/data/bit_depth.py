"""Images of more than 8 bits: `convert("RGB")`, which pipelines call, clips them; here that is counted, or avoided."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hf_kdtl.data.decoding import open_image, upright
from hf_kdtl.utils.text import one_line, some

if TYPE_CHECKING:
    from datasets import Dataset

CHOICES = ("clip", "scale")
_LOOKED_AT = 256
"""So many headers of a split are read, evenly spaced, before all of them are."""
_MEASURED = 100
_TOPS = [2**bits - 1 for bits in (8, 10, 12, 14, 16)]


def check_bit_depths(splits: dict[str, Dataset], choice: str, notes: list[str]) -> dict[str, Dataset]:
    """Note how many images have more than 8 bits and what share of their pixels is clipped; with "scale", scale them.

    One range serves all images, so that brightness keeps its meaning between them: the smallest of 8, 10, 12, 14 and
    16 bits that holds the images of train (floats: of [0, 1] and these), or their minimum and maximum.

    Raises:
        ValueError: with "scale", for an image with nan or infinity.
    """
    found = {name: _high_images(split) for name, split in splits.items()}
    for name, rows in found.items():
        if not rows or choice == "scale":
            continue
        share = _clipped(splits[name], rows)
        notes.append(
            f'{len(rows)} of {len(splits[name])} images of {name} have more than 8 bits. pipeline("image-'
            f'classification") clips such values to [0, 255], and so does training: {share:.0%} of their pixels are '
            'changed. To train on scaled pixels: high_bit_depth="scale" (--high_bit_depth scale).'
        )
    if choice == "clip" or not any(found.values()):
        return splits
    source = "train" if found["train"] else next(name for name, rows in found.items() if rows)
    ranges = _ranges(splits[source], found[source])
    for name, rows in found.items():
        for index in rows:  # an image of another split may be of a kind that train does not have
            kind = _kind(rows[index])
            if kind not in ranges:
                raise ValueError(
                    f"Image {index} of {name} has pixels of mode {rows[index]!r}, and the images of {source} that "
                    "have more than 8 bits are of another kind; expected one kind. Convert them to one mode."
                )
    notes.append(_scaling_note(ranges, {name: len(rows) for name, rows in found.items() if rows}))
    return {name: _scale_split(split, found[name], ranges) for name, split in splits.items()}


@dataclass(frozen=True)
class Range:
    """The values that become 0 and 255."""

    low: float
    high: float

    def apply(self, image: Image.Image) -> Image.Image:
        """The image as 8-bit grey; values outside the range are clipped."""
        values = np.asarray(image)
        grey = np.empty(values.shape, np.uint8)
        for top in range(0, len(values), 256):  # in strips: as float64 at once, a small file could take gigabytes
            strip = slice(top, top + 256)
            scaled = (values[strip].astype(np.float64) - self.low) * (255 / (self.high - self.low or 1))
            grey[strip] = np.rint(scaled.clip(0, 255))
        return Image.fromarray(grey)


def _high_images(split: Dataset) -> dict[int, str]:
    """{row: mode} of the images of more than 8 bits, by their headers; {} where a sample of rows has none."""
    images = split.with_format(None)["image"]
    sample = np.unique(np.linspace(0, len(split) - 1, min(len(split), _LOOKED_AT)).astype(int)).tolist()
    if not any(_is_high(_mode(images[row])) for row in sample):
        return {}
    modes = {row: _mode(image) for row, image in enumerate(images)}
    return {row: mode for row, mode in modes.items() if _is_high(mode)}


def _mode(image: dict[str, Any]) -> str:
    try:
        with open_image(image["bytes"] or image["path"]) as opened:
            return opened.mode
    except Exception:  # an unreadable image is reported when it is decoded
        return ""


def _is_high(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def _kind(mode: str) -> str:
    return "float" if mode == "F" else "integer"


def _values(image: dict[str, Any]) -> np.ndarray | None:
    try:
        with open_image(image["bytes"] or image["path"]) as opened:
            return np.asarray(opened)
    except Exception:
        return None


def _spread(rows: dict[int, str], most: int) -> list[int]:
    listed = list(rows)
    return [listed[i] for i in np.unique(np.linspace(0, len(listed) - 1, min(most, len(listed))).astype(int))]


def _clipped(split: Dataset, rows: dict[int, str]) -> float:
    """The share of pixels that convert("RGB") changes by more than rounding; over at most 100 images."""
    changed = total = 0
    for row in _spread(rows, _MEASURED):
        if (values := _values(split[row]["image"])) is None:
            continue
        # A float image in [0, 1] becomes black, its ones excepted: all of it is changed, though nothing is outside.
        lost = np.ones(values.shape, bool) if values.max() <= 1 and rows[row] == "F" else (values < 0) | (values > 255)
        changed, total = changed + int(lost.sum()), total + values.size
    return changed / max(total, 1)


def _ranges(split: Dataset, rows: dict[int, str]) -> dict[str, Range]:
    extremes: dict[str, tuple[float, float]] = {}
    for row, mode in rows.items():
        image = split[row]["image"]
        if (values := _values(image)) is None:
            continue
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            name = one_line(image["path"] or f"image {row}")
            raise ValueError(f"The pixels of {name} range from {low} to {high}, expected finite values.")
        before = extremes.get(_kind(mode), (low, high))
        extremes[_kind(mode)] = min(low, before[0]), max(high, before[1])
    return {kind: _range(kind, *both) for kind, both in extremes.items()}


def _range(kind: str, low: float, high: float) -> Range:
    tops = [1, *_TOPS] if kind == "float" else _TOPS
    fitting = [top for top in tops if low >= 0 and high <= top]
    return Range(0, fitting[0]) if fitting else Range(low, high)


def _scaling_note(ranges: dict[str, Range], counts: dict[str, int]) -> str:
    spans = some([f"{r.low:g} to {r.high:g} ({kind})" for kind, r in ranges.items()])
    r = next(iter(ranges.values()))
    return (
        f"{some([f'{count} images of {name}' for name, count in counts.items()])} have more than 8 bits and were "
        f"scaled: {spans} became 0 to 255 (high_bit_depth: scale). pipeline() does not scale: convert such images "
        f"first, Image.fromarray(((np.asarray(image, float) - {r.low:g}) * {255 / (r.high - r.low or 1):.6g})"
        '.clip(0, 255).round().astype("uint8")).'
    )


def _scale_split(split: Dataset, rows: dict[int, str], ranges: dict[str, Range]) -> Dataset:
    def scaled(image: dict[str, Any], row: int) -> dict[str, Any]:
        if row not in rows:
            return {"image": image}
        try:
            with open_image(image["bytes"] or image["path"]) as opened:
                grey = ranges[_kind(rows[row])].apply(upright(opened))
        except OSError:
            return {"image": image}  # unreadable: reported when it is decoded
        grey.save(file := io.BytesIO(), "PNG")
        return {"image": {"bytes": file.getvalue(), "path": image["path"]}}

    # Never from the cache: it knows an image by its path, and the file may have changed.
    options: dict[str, Any] = {"load_from_cache_file": False, "features": split.features}
    return split.map(scaled, input_columns=["image"], with_indices=True, desc="scaling to 8 bits", **options)
