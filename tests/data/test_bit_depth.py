from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.data import load_images
from hf_kdtl.data.decoding import decode_row


def written(root: Path, arrays, kind: str = "png") -> str:
    for number, array in enumerate(arrays):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{number}.{kind}")
    return str(root)


def levels(data) -> list[int]:
    """The grey levels that training sees, over all images of train."""
    seen = [np.asarray(decode_row(image, 0, 1)) for image in data.train["image"]]
    return np.unique(np.stack(seen)).tolist()


def test_clipped_images_are_counted(tmp_path):
    half_clipped = np.array([[0, 255, 256, 65535]] * 2, np.uint16)
    images = [half_clipped] * 10 + [np.zeros((2, 4), np.uint8)] * 10
    data = load_images(written(tmp_path, images))
    notes = [note for note in data.notes if "more than 8 bits" in note]
    counts = [int(note.split()[0]) for note in notes]
    assert sum(counts) == 10
    assert all("50% of their pixels are changed" in note and '"scale"' in note for note in notes)
    assert levels(data) == [0, 255]
    assert data.high_bit_depth == "clip"


@pytest.mark.parametrize(
    ("array", "kind", "expected", "high"),
    [
        (np.array([[0, 2048, 4095]], np.uint16), "png", [0, 128, 255], 4095),  # 12 bits in 16
        (np.array([[0, 12850, 65535]], np.uint16), "tif", [0, 50, 255], 65535),
        (np.array([[0, 12850, 65535]], np.int32), "tif", [0, 50, 255], 65535),
        (np.array([[0.0, 0.2, 1.0]], np.float32), "tif", [0, 51, 255], 1),
        (np.array([[0.0, 51.0, 254.0]], np.float32), "tif", [0, 51, 254], 255),
        (np.array([[-1.0, 0.0, 3.0]], np.float32), "tif", [0, 64, 255], 3),
    ],
)
def test_scaled_images_keep_their_levels(tmp_path, array, kind, expected, high):
    data = load_images(written(tmp_path, [array] * 20, kind), high_bit_depth="scale")
    assert levels(data) == expected
    assert data.high_bit_depth == "scale"
    (note,) = [note for note in data.notes if "more than 8 bits" in note]
    assert f"to {high} (" in note
    assert "pipeline() does not scale: convert such images first" in note


def test_one_factor_serves_all_images(tmp_path):
    dark, bright = np.full((2, 2), 400, np.uint16), np.full((2, 2), 4000, np.uint16)
    data = load_images(written(tmp_path, [dark, bright] * 10), high_bit_depth="scale")
    assert levels(data) == [25, 249]


def test_the_note_s_conversion_gives_the_pixels_of_training(tmp_path):
    image = np.array([[0, 700, 4095, 30]], np.uint16)
    data = load_images(written(tmp_path, [image] * 20), high_bit_depth="scale")
    (note,) = [note for note in data.notes if "more than 8 bits" in note]
    factor = float(note.split(") * ")[1].split(")")[0])
    converted = (image * factor).clip(0, 255).round().astype("uint8")
    assert np.asarray(decode_row(data.train[0]["image"], 0, 1))[..., 0].tolist() == converted.tolist()


def test_images_of_8_bits_are_left_alone(tmp_path):
    source = written(tmp_path, [np.full((2, 2), i, np.uint8) for i in range(20)])
    clipped, scaled = load_images(source), load_images(source, high_bit_depth="scale")
    assert clipped.notes == scaled.notes
    assert clipped.train["image"][:] == scaled.train["image"][:]


def test_wrong_choices_and_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="high_bit_depth is 'stretch', expected 'clip' or 'scale'"):
        load_images(high_bit_depth="stretch")
    source = written(tmp_path, [np.full((1, 1), np.nan, np.float32)] * 20, "tif")
    with pytest.raises(ValueError, match=r"0\.tif range from nan to nan, expected finite"):
        load_images(source, high_bit_depth="scale")
