"""Degradations: against scipy and Pillow, the same for every batch, order and model, and refused where wrong."""

import io
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import ViTImageProcessor

from hf_kdtl.data import degradations as d
from hf_kdtl.data.degraded import degraded
from hf_kdtl.functional.random import Draws
from hf_kdtl.reports.figures.degradation_gallery import degradation_gallery, example_image
from tests.reference import degradations as reference

ROOT = Path(__file__).parents[2]
RANDOM = ("gaussian_noise", "impulse_noise", "motion_blur", "brightness", "occlusion")
every = pytest.mark.parametrize("name", d.DEGRADATIONS)
severities = pytest.mark.parametrize("severity", d.SEVERITIES)


def images(number=3, height=32, width=40, dtype=torch.float32):
    """The drawing at another size, mirrored, turned: smooth parts, edges, and both ends of the range."""
    drawn = np.array(example_image(96).resize((width, height))) / 255.0
    drawn[0, 0], drawn[-1, -1] = 0.0, 1.0
    changes = [drawn, drawn[:, ::-1], drawn[::-1], 1 - drawn][:number]
    return torch.stack([torch.tensor(c.copy()).permute(2, 0, 1) for c in changes]).to(dtype)


def amount(name, severity):
    return d.DEGRADATIONS[name].amounts[severity - 1]


def files(number=6, height=24, width=30):
    """A split as `load_images` gives it."""

    def file(pixels):
        PIL.Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy()).save(f := io.BytesIO(), "png")
        return {"bytes": f.getvalue(), "path": None}

    rows = [file(pixels) for pixels in images(3, height, width)]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    columns = {"image": [rows[i % 3] for i in range(number)], "label": [i % 2 for i in range(number)]}
    return Dataset.from_dict(columns, features=features)


def processor(side=32, **options):
    return ViTImageProcessor(size={"height": side, "width": side}, **options)


# ---- What is promised of every degradation ----


@every
@severities
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_dtype_and_range_are_kept(name, severity, dtype):
    pixels = images(2, dtype=dtype).requires_grad_()
    before = pixels.detach().clone()
    found = d.DEGRADATIONS[name](pixels, severity, (0, 1))
    assert found.shape == pixels.shape and found.dtype == dtype and not found.requires_grad
    assert found.min() >= 0 and found.max() <= 1
    assert not torch.equal(found, pixels) and torch.equal(pixels, before)


@every
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (17, 50)])
def test_any_size(name, size):
    pixels = torch.rand(2, 3, *size)
    found = d.DEGRADATIONS[name](pixels, 5, (0, 1))
    assert found.shape == pixels.shape and found.isfinite().all()


@every
def test_an_image_does_not_depend_on_its_batch(name):
    pixels, change = images(), d.DEGRADATIONS[name]
    entire = change(pixels, 3, (7, 2, 11))
    torch.testing.assert_close(change(pixels[[2, 0]], 3, (11, 7)), entire[[2, 0]], rtol=0, atol=1e-6)
    torch.testing.assert_close(change(pixels[1:2], 3, np.array([2])), entire[1:2], rtol=0, atol=1e-6)
    assert torch.equal(change(pixels, 3, (7, 2, 11)), entire)


@pytest.mark.parametrize("name", RANDOM)
def test_draws_belong_to_the_image_and_the_severity(name):
    one = images(1)
    pixels = one.expand(40, -1, -1, -1)
    found = d.DEGRADATIONS[name](pixels, 4, range(40))
    different = len({tuple(image.flatten().tolist()) for image in found})
    few = {"brightness": 2, "occlusion": 30}  # two directions; places fall on whole pixels
    assert few.get(name, 40) <= different <= (2 if name == "brightness" else 40)
    state = torch.get_rng_state()
    d.DEGRADATIONS[name](one, 4, (0,))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_of_two_severities_and_of_two_degradations_differs():
    grey = torch.full((1, 3, 32, 32), 0.5)
    one, other = (d.DEGRADATIONS["gaussian_noise"](grey, s, (3,)) - 0.5 for s in (1, 2))
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.1
    draws = Draws(0, 1, (3,))
    assert draws.uniform((), "occlusion", grey) != draws.uniform((), "motion_blur", grey)


@every
def test_each_severity_does_more(name):
    change, pixels = d.DEGRADATIONS[name], images(4, 64, 64).repeat(8, 1, 1, 1)
    far = [(change(pixels, s, range(32)) - pixels).square().mean().item() for s in d.SEVERITIES]
    assert far == sorted(far) and far[0] > 0 and far[4] > 2 * far[0], far


@pytest.mark.parametrize("name", ["gaussian_blur", "motion_blur", "contrast", "occlusion"])
def test_small_and_large_images_suffer_alike(name):
    """These are in units of the image: the same picture at three times the size changes as much."""
    small, large = (
        (d.DEGRADATIONS[name](one, 5, range(4)) - one).square().mean().item()
        for one in (images(4, 64, 64), images(4, 192, 192))
    )
    assert small == pytest.approx(large, rel=0.25)


# ---- Against the references ----


@severities
def test_gaussian_noise(severity):
    pixels = images(2, dtype=torch.float64)
    noise = Draws(0, severity, (4, 9)).normal((3, 32, 40), "gaussian_noise", pixels)
    found = d.DEGRADATIONS["gaussian_noise"](pixels, severity, (4, 9))
    for i in range(2):
        expected = reference.gaussian_noise(pixels[i].numpy(), noise[i].numpy(), amount("gaussian_noise", severity))
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-12)


def test_gaussian_noise_is_normal_and_white():
    grey = torch.full((4, 3, 64, 64), 0.5)
    noise = (d.DEGRADATIONS["gaussian_noise"](grey, 2, range(4)) - 0.5) / amount("gaussian_noise", 2)
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < 0.01
    assert torch.corrcoef(noise.permute(1, 0, 2, 3).flatten(1)).fill_diagonal_(0).abs().max() < 0.04
    assert (noise[..., 1:] * noise[..., :-1]).mean().abs() < 0.02


@severities
def test_impulse_noise(severity):
    pixels = torch.full((8, 3, 64, 64), 0.5)
    found = d.DEGRADATIONS["impulse_noise"](pixels, severity, range(8))
    share = amount("impulse_noise", severity)
    spread = 4 * (share / found[:, 0].numel()) ** 0.5
    for value in (0.0, 1.0):
        hit = (found == value).all(1).float().mean().item()
        assert abs(hit - share / 2) < spread
    assert ((found == 0.5) | (found == 0) | (found == 1)).all() and (found == found[:, :1]).all()


@severities
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gaussian_blur(severity, dtype, tolerance):
    """scipy cuts its kernel at round(4 sigma), ours reaches ceil(4 sigma): the weights between are below 1e-4."""
    pixels = images(2, dtype=dtype)
    sigma = amount("gaussian_blur", severity) * 32
    found = d.DEGRADATIONS["gaussian_blur"](pixels, severity, (0, 1))
    for image, got in zip(pixels.double().numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(got, reference.gaussian_blur(image, sigma), rtol=0, atol=1e-3)
        radius = int(np.ceil(4 * sigma))
        expected = np.stack(
            [reference.ndimage.gaussian_filter(c, sigma, mode="nearest", radius=radius) for c in image]
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@severities
def test_motion_blur(severity):
    pixels = images(3, dtype=torch.float64)
    angles = torch.pi * Draws(0, severity, (5, 6, 7)).uniform((), "motion_blur", pixels)
    found = d.DEGRADATIONS["motion_blur"](pixels, severity, (5, 6, 7))
    for image, angle, got in zip(pixels.numpy(), angles.tolist(), found.numpy(), strict=True):
        expected = reference.motion_blur(image, amount("motion_blur", severity) * 32, angle)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_motion_goes_in_every_direction():
    angles = torch.pi * Draws(0, 3, tuple(range(400))).uniform((), "motion_blur", torch.zeros(()))
    assert torch.histc(angles, 8, 0, torch.pi).min() > 30


@severities
def test_jpeg_is_pillows_file(severity):
    pixels = (255 * images(2)).round() / 255
    found = d.DEGRADATIONS["jpeg"](pixels, severity, (0, 1))
    for image, got in zip(pixels, found, strict=True):
        expected, _ = reference.jpeg_file((255 * image).byte().permute(1, 2, 0).numpy(), amount("jpeg", severity))
        torch.testing.assert_close(got, torch.tensor(expected).permute(2, 0, 1) / 255, rtol=0, atol=1e-6)


@severities
def test_jpeg_is_what_the_standard_says(severity):
    """A grey image against a block transform of our own: to a level of 255 in most blocks; in some, a coefficient on
    the edge of two steps falls to the other side, because the codec's transform is of integers."""
    grey = (255 * images(1, 32, 40)[0].mean(0)).round().numpy()
    found = d.DEGRADATIONS["jpeg"](torch.tensor(grey / 255).float().expand(1, 3, -1, -1), severity, (0,))
    _, tables = reference.jpeg_file(np.stack([grey] * 3, -1).astype(np.uint8), amount("jpeg", severity))
    expected = reference.jpeg_of_grey(grey, np.array(tables[0]).reshape(8, 8))
    error = 255 * found[0, 0].numpy() - expected
    blocks = np.abs(error).reshape(4, 8, 5, 8).max((1, 3))
    assert (blocks <= 1.01).mean() >= 0.8
    assert np.square(error).mean() < 0.025 * np.square(expected - grey).mean()


@severities
def test_contrast(severity):
    pixels = images(2, dtype=torch.float64)
    found = d.DEGRADATIONS["contrast"](pixels, severity, (0, 1))
    for image, got in zip(pixels.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(got, reference.contrast(image, amount("contrast", severity)), rtol=0, atol=1e-6)


@severities
def test_brightness(severity):
    pixels, shift = images(1).expand(60, -1, -1, -1), amount("brightness", severity)
    found = d.DEGRADATIONS["brightness"](pixels, severity, range(60))
    up, down = (pixels[0] + shift).clamp(0, 1), (pixels[0] - shift).clamp(0, 1)
    brighter = [torch.allclose(one, up, atol=1e-6) for one in found]
    assert all(b or torch.allclose(one, down, atol=1e-6) for b, one in zip(brighter, found, strict=True))
    assert 15 < sum(brighter) < 45


@severities
def test_downscale(severity):
    pixels = images(2)
    found = d.DEGRADATIONS["downscale"](pixels, severity, (0, 1))
    for image, got in zip(pixels.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(got, reference.downscale(image, amount("downscale", severity)), rtol=0, atol=1e-5)


@severities
def test_occlusion(severity):
    pixels = torch.zeros(300, 3, 20, 25)
    found = d.DEGRADATIONS["occlusion"](pixels, severity, range(300))
    hidden = found[:, 0] == 0.5
    assert (found == 0.5).all(1).equal(hidden) and (found[~hidden[:, None].expand_as(found)] == 0).all()
    share = amount("occlusion", severity)
    assert abs(hidden.float().mean((1, 2)) - share).max() < 0.03
    rows, columns = hidden.any(2), hidden.any(1)
    assert (rows.sum(1) * columns.sum(1) == hidden.sum((1, 2))).all()  # one rectangle, nothing cut off
    for side in (rows, columns):  # it gets everywhere
        assert side.any(0).all()


# ---- Refused ----


@every
@pytest.mark.parametrize("severity", [0, 6, -1, 2.0, True, "3", None])
def test_other_severities(name, severity):
    with pytest.raises(ValueError, match="whole number from 1 to 5"):
        d.DEGRADATIONS[name](images(1), severity, (0,))


@every
@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8.*Divide"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\).*expected \(B, 3, h, w\)"),
        (torch.zeros(1, 1, 8, 8), r"expected \(B, 3, h, w\)"),
        (torch.zeros(0, 3, 8, 8), r"expected \(B, 3, h, w\)"),
        (torch.full((1, 3, 8, 8), 1.01), r"\[1.01, 1.01\].*normalise afterwards"),
        (torch.full((1, 3, 8, 8), -0.1), "normalise afterwards"),
        (torch.full((1, 3, 8, 8), float("nan")), "normalise afterwards"),
        (torch.zeros(2, 3, 8, 8), "2 images and 1 indices"),
    ],
)
def test_other_pixels(name, pixels, words):
    with pytest.raises(ValueError, match=words):
        d.DEGRADATIONS[name](pixels, 1, (0,))


def test_unknown_names_and_sides():
    with pytest.raises(ValueError, match=r"unknown degradation: 'gausian_noise'.*Did you mean 'gaussian_noise'"):
        degraded(files(), processor(), "gausian_noise", 1, 32)
    with pytest.raises(ValueError, match="from 1 to 5"):
        degraded(files(), processor(), "jpeg", 0, 32)
    for side in (0, 32.0, None):
        with pytest.raises(ValueError, match="side is"):
            degraded(files(), processor(), "jpeg", 1, side)


# ---- As data ----


@every
def test_a_degraded_split_is_the_degraded_file_before_the_processor(name):
    plain = processor(24, do_resize=False, do_normalize=False)
    data = degraded(files(), plain, name, 3, 24)
    found = torch.stack([row["pixel_values"] for row in data.__getitems__([4, 1])])
    expected = d.DEGRADATIONS[name]((255 * images(3, 24, 30)[[1, 1]]).round() / 255, 3, (4, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5 / 255 + 1e-6)
    assert [row["labels"] for row in data.__getitems__([4, 1])] == [0, 1] and len(data) == 6


def test_two_processors_see_the_same_image():
    one = degraded(files(), processor(48, do_normalize=False), "gaussian_noise", 3, 24)
    other = degraded(
        files(), processor(48, image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.2, 0.1]), "gaussian_noise", 3, 24
    )
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.3, 0.2, 0.1])[:, None, None]
    torch.testing.assert_close(other[2]["pixel_values"] * std + mean, one[2]["pixel_values"], rtol=0, atol=1e-5)


def test_the_order_of_reading_does_not_matter():
    data = degraded(files(), processor(), "gaussian_noise", 2, 32)
    entire = [row["pixel_values"] for row in data.__getitems__([0, 1, 2, 3, 4, 5])]
    assert all(torch.equal(data[i]["pixel_values"], entire[i]) for i in (5, 0, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), torch.stack(entire))
    assert not torch.equal(entire[0], entire[3])  # the same file in another row


def test_large_images_are_scaled_down_first():
    """Noise on a large image would be averaged away by the processor's resizing."""
    kept = processor(24, do_normalize=False)

    def noise(height, width, side):
        split = files(3, height, width)
        rows = [
            degraded(split, kept, "gaussian_noise", 5, side)[0],
            degraded(split, kept, "gaussian_noise", 1, side)[0],
        ]
        return (rows[0]["pixel_values"] - rows[1]["pixel_values"]).std().item()

    assert noise(240, 300, 24) == pytest.approx(noise(24, 30, 24), rel=0.15)
    assert noise(240, 300, 240) < 0.3 * noise(24, 30, 24)


# ---- The document ----


def test_the_document_has_the_table_and_the_picture():
    text = (ROOT / "docs" / "degradations.md").read_text()
    (table,) = re.findall(r"<!-- severities -->\n(.*)\n<!-- /severities -->", text, re.DOTALL)
    assert table == d.severity_table()
    assert (ROOT / "docs" / "degradations.png").is_file() and "(degradations.png)" in text


@pytest.mark.slow
def test_a_picture_is_drawn(tmp_path):
    degradation_gallery(tmp_path / "degradations.png", example_image(24))
    pixels = np.array(PIL.Image.open(tmp_path / "degradations.png"))
    assert pixels.shape[0] > 1000 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 1000
