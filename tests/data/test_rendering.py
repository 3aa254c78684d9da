"""The steps of image processors, replayed on parts of images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_kdtl.data.augmentation import Changes, Mixing, Part, Shift
from hf_kdtl.data.rendering import Renderer, mix, render
from hf_kdtl.models.teachers.pixels import test_image as photograph

SIDE = {"height": 16, "width": 16}


def file(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def shown(cell, renderer, changes=Changes()):  # noqa: B008
    return render(cell, 0, 1, [renderer], changes)[0]


def stretched(**options):
    return Renderer(ViTImageProcessorPil(**{"size": SIDE, **options}))


PHOTO = Image.fromarray(photograph(150, 200))
WAYS = {
    "stretched": ViTImageProcessorPil(size={"height": 20, "width": 30}),
    "center": CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIDE),
    "stretched, then the center": DeiTImageProcessorPil(size={"height": 24, "width": 24}, crop_size=SIDE),
    "proportional": CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False),
    "as it is": ViTImageProcessorPil(do_resize=False),
    "as bytes": ViTImageProcessorPil(size=SIDE, do_rescale=False, image_mean=[99.0] * 3, image_std=[50.0] * 3),
    "raw": ViTImageProcessorPil(size=SIDE, do_normalize=False, resample=3),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_unchanged_image_has_the_processors_own_pixels(way):
    renderer = Renderer(WAYS[way])
    for image in (PHOTO, PHOTO.transpose(Image.Transpose.TRANSPOSE), PHOTO.resize((90, 90))):
        own = torch.as_tensor(WAYS[way](image)["pixel_values"][0])
        mine = renderer.values(shown(file(image), renderer))
        assert mine.shape == own.shape and mine.dtype == torch.float32
        # The center is cut from the image itself, where the processor first rounds the size it resizes to.
        assert (mine - own).abs().mean() < (0.02 if way == "center" else 1e-5) * own.std()


def test_channels_in_the_order_blue_green_red():
    class Reversed(ViTImageProcessorPil):
        def __call__(self, images, **kwargs):
            found = super().__call__(images, **kwargs)
            found["pixel_values"] = [torch.as_tensor(array).flip(0) for array in found["pixel_values"]]
            return found if "return_tensors" not in kwargs else {"pixel_values": torch.stack(found["pixel_values"])}

    processor = Reversed(size=SIDE, image_mean=[0.1, 0.5, 0.9])
    mine = (renderer := Renderer(processor)).values(shown(file(PHOTO), renderer))
    torch.testing.assert_close(mine, processor([PHOTO])["pixel_values"][0], atol=1e-5, rtol=0)


def test_processors_with_other_steps_are_refused():
    class Odd(ViTImageProcessorPil):
        def normalize(self, image, mean, std, **kwargs):
            return super().normalize(image, mean, std, **kwargs) ** 2

    class Rolled(ViTImageProcessorPil):
        def resize(self, image, *args, **kwargs):
            return np.roll(super().resize(image, *args, **kwargs), 5, axis=-1)

    for kind in (Odd, Rolled):
        with pytest.raises(ValueError, match=rf"augmentation replays .*{kind.__name__} .*without augmentation"):
            Renderer(kind(size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match=r"CLIPImageProcessor.* pads images"):
        Renderer(CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 30, "width": 30}))


def test_a_crop_is_cut_from_the_image_and_resized_once():
    part = Part(0.2, 1.2, 0.3, 0.8)
    mine = shown(file(PHOTO), stretched(), Changes(part=part))
    expected = np.asarray(PHOTO.resize((16, 16), Image.Resampling.BILINEAR, box=part.box(200, 150)))
    assert np.array_equal(mine, expected)
    blurred = Image.fromarray(shown(file(PHOTO), stretched())).resize(
        (16, 16), Image.Resampling.BILINEAR, box=part.box(16, 16)
    )
    assert np.diff(expected.astype(int), axis=0).std() > 1.3 * np.diff(np.asarray(blurred, int), axis=0).std()


@pytest.mark.parametrize("down", [-2, 0, 3])
def test_a_shift_moves_the_pixels_and_fills_with_black(down):
    u = (down + 4 + 0.5) / 9, 0.5 / 9  # 4 pixels to the left edge of the section
    still, moved = shown(file(PHOTO), stretched()), shown(file(PHOTO), stretched(), Changes(shift=Shift(4, *u)))
    expected = np.zeros_like(still)
    rows = slice(max(0, -down), 16 - max(0, down))
    expected[rows, 4:] = still[max(0, down) : 16 - max(0, -down), : 16 - 4]
    assert np.abs(moved.astype(int) - expected).max() <= 1  # resized in two sums
    assert (moved[:, :4] == 0).all()


def test_a_shift_of_a_central_crop_shows_what_lies_beside_it():
    renderer = Renderer(WAYS["center"])
    moved = shown(file(PHOTO), renderer, Changes(shift=Shift(2, 0.5, 0.99)))
    assert (moved[:, -2:] > 0).any(-1).all()  # the section ends 50 - 25 pixels before the image does


def test_flip_colors_and_erasing_act_in_this_order():
    factors = 1.2, 0.7, 0.5
    mine = shown(file(PHOTO), stretched(), Changes(flip=True, factors=factors, erased=(0.25, 0.5, 0.5, 1.0)))
    image = PHOTO.resize((16, 16), Image.Resampling.BILINEAR).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    luminance = np.array([0.299, 0.587, 0.114])
    expected = np.array(image, float) * factors[0]
    expected += (1 - factors[1]) * ((expected @ luminance).mean() - expected)
    expected = (factors[2] * expected + (1 - factors[2]) * (expected @ luminance)[..., None]).clip(0, 255)
    expected[4:8, 8:] = 128
    assert np.abs(mine - expected).max() <= 0.5 + 0.3 * 0.5 + 1e-3  # the mean color is rounded to 8 bits


def test_two_sizes_show_the_same():
    side = {"height": 64, "width": 64}
    small, large = stretched(), Renderer(CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=side))
    large_stretched = Renderer(ViTImageProcessorPil(size=side))
    changes = Changes(Shift(4, 0.2, 0.9), flip=True, factors=(1.1, 0.9, 1.2), erased=(0.25, 0.5, 0.75, 1.0))
    both = render(file(PHOTO), 0, 1, [small, large_stretched], changes)
    assert [pixels.shape for pixels in both] == [(16, 16, 3), (64, 64, 3)]
    reduced = both[1].reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(reduced - both[0]).mean() < 6
    alone = shown(file(PHOTO), small, changes)
    assert np.array_equal(both[0], alone)  # the student's do not depend on the teacher's
    part = Changes(part=Part(0.3, 1.0, 0.1, 0.9))  # of the file, whatever the processors show of it
    both = render(file(PHOTO), 0, 1, [small, large], part)
    assert np.abs(both[1].reshape(16, 4, 16, 4, 3).mean((1, 3)) - both[0]).mean() < 6


@pytest.mark.parametrize("size", [(400, 300), (401, 303)])
def test_a_large_jpeg_is_decoded_smaller_and_shows_the_same(size):
    image = Image.fromarray(photograph(size[1], size[0]))
    cell = file(image, "JPEG", quality=95)
    exact = Image.open(io.BytesIO(cell["bytes"])).convert("RGB")
    for changes in (Changes(), Changes(part=Part(0.3, 1.0, 1.0, 1.0)), Changes(shift=Shift(3, 0.0, 0.99))):
        renderer, factors = stretched(), []
        region = renderer.region

        def recording(*given, region=region, factors=factors):
            factors.append((found := region(*given)).factor)
            return found

        renderer.region = recording
        reduced = shown(cell, renderer, changes).astype(float)
        expected = shown(file(exact), stretched(), changes).astype(float)
        assert factors[0] > 1 and np.abs(reduced - expected).mean() < 1.5
        assert np.diff(reduced, axis=0).std() > 0.98 * np.diff(expected, axis=0).std()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_upright_before_it_is_cropped(orientation):
    image = Image.fromarray(photograph(300, 400))
    (exif := Image.Exif())[0x0112] = orientation
    cell = file(image, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(cell["bytes"]))).convert("RGB")
    changes = Changes(part=Part(0.3, 1.3, 0.0, 0.9))
    expected = shown(file(upright), stretched(), changes)
    assert np.abs(shown(cell, stretched(), changes).astype(float) - expected).mean() < 1.5


def test_mixtures_weigh_pixels_as_they_say():
    renderer = stretched(do_normalize=False)
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    value, weight = mix(renderer, Mixing(0.0, 0.25, None), white, black)
    assert weight == 0.25 and torch.allclose(value, torch.tensor(0.25))
    value, weight = mix(renderer, Mixing(0.0, 0.4, (0.1, 0.0, 0.52, 1.0)), white.copy(), black)
    assert weight == 1 - 6 * 16 / 256 and value.mean().item() == pytest.approx(weight)
    assert (value[:, 2:8] == 0).all() and (value[:, 8:] == 1).all() and (value[:, :2] == 1).all()
