"""Every image processor of transformers: the teacher sees what its own gives, or the processor is refused."""

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import ViTImageProcessor

from hf_kdtl.models import Teacher
from hf_kdtl.models.teachers.pixels import PixelAdapter, PixelFormat, match_pixels
from tests.support.tiny import build

SQUARE, SHORT = {"height": 32, "width": 32}, {"shortest_edge": 32}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# All classes that AutoImageProcessor has for image classifiers, as they are for 32 x 32 pixels, and the largest
# distance in their own units: resized twice, values between 0 and 255 rounded.
EXACT = {
    "Beit": {"size": SQUARE, "do_center_crop": False},
    "Bit": {"size": SHORT, "crop_size": SQUARE},
    "CLIP": {"size": SHORT, "crop_size": SQUARE},
    "EfficientNet": {"size": SQUARE},
    "Gemma3": {"size": SQUARE, "do_pan_and_scan": False},
    "Pvt": {"size": SQUARE},
    "Segformer": {"size": SQUARE},
    "Siglip": {"size": SQUARE},
    "TextNet": {"size": SHORT},
    "ViT": {"size": SQUARE, "image_mean": 0.4, "image_std": 0.25},  # numbers, as is documented
}
CROPPED = {
    "ConvNext": {"size": SHORT},
    "DeiT": {"size": {"height": 36, "width": 36}, "crop_size": SQUARE},
    "Levit": {"size": SHORT, "crop_size": SQUARE},
    "MobileNetV1": {"size": {"shortest_edge": 36}, "crop_size": SQUARE},
    "MobileNetV2": {"size": {"shortest_edge": 36}, "crop_size": SQUARE},
    "MobileViT": {"size": {"shortest_edge": 36}, "crop_size": SQUARE},
    "Perceiver": {"size": SQUARE, "crop_size": {"height": 36, "width": 36}},
    "PoolFormer": {"size": SHORT, "crop_size": SQUARE},
}
REFUSED = {
    "Donut": ({"size": {"height": 40, "width": 32}}, "pads images|does more than resize and crop"),
    "ImageGPT": ({"size": SQUARE, "clusters": [[-1, -1, -1], [1, 1, 1]]}, "fails on a test image"),
    "Siglip2": ({"patch_size": 8, "max_num_patches": 16}, r"gives pixel_values of shape \(1, 16, 192\)"),
    "MobileViT": ({"size": SHORT, "crop_size": {"height": 36, "width": 36}}, "pads images"),
}


def _make(name, options):
    if name == "Segformer" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("it needs torchvision there")
    return getattr(transformers, f"{name}ImageProcessor")(**options)


def _image(height=32, width=32, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _given(processor, image):
    return processor(images=[image], return_tensors="pt")["pixel_values"]


def _seen(student, teacher, image):
    """What the teacher is shown and what its own processor gives."""
    held = Teacher(build("vit", seed=5), teacher)
    held.match(build("vit"), student, compare_classes=False)
    return held.pixels(_given(student, image)), _given(teacher, image), held.notes


@pytest.mark.parametrize("name", EXACT)
def test_the_teacher_sees_what_its_own_processor_gives(name):
    seen, own, _ = _seen(
        ViTImageProcessor(size=SQUARE, image_mean=[0.1, 0.2, 0.3]), _make(name, EXACT[name]), _image()
    )
    torch.testing.assert_close(seen, own, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CROPPED)
def test_a_crop_is_the_teachers_crop(name):
    """Up to 8-bit rounding between resizing and normalizing, which the student's pixels do not have."""
    student, teacher = ViTImageProcessor(size=SQUARE, resample=3), _make(name, CROPPED[name])
    seen, own, notes = _seen(student, teacher, _image())
    assert seen.shape == own.shape
    assert ((seen - own).abs().mean() / own.std()).item() < (0.035 if name == "Perceiver" else 0.02)  # crops first
    assert "of the central" in notes[-1] and "Distance to the teacher's own processor" in notes[-1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_described_is_refused(name):
    options, message = REFUSED[name]
    for pair in ((ViTImageProcessor(size=SQUARE), _make(name, options)), (_make(name, options), ViTImageProcessor())):
        with pytest.raises(ValueError, match=message):
            match_pixels(*pair)
    assert match_pixels(_make(name, options), _make(name, options)) == (None, "")


def test_every_processor_of_an_image_classifier_is_listed():
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    found = {name for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
             for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {}).values()}  # fmt: skip
    known = {f"{name}ImageProcessor" for name in (*EXACT, *CROPPED, *REFUSED)}
    # Not installable without torchvision and timm: tried below as classes of the same arithmetic.
    assert {name.removesuffix("Pil") for name in found} - known == {
        "PPLCNetImageProcessor",
        "TimmWrapperImageProcessor",
    }


class _Plain:
    """A processor with no attributes: resize to `resized`, crop, scale to [0, 1], normalize, channels in any order."""

    def __init__(self, resized=36, order=(0, 1, 2), change=lambda x: x):
        self.steps = resized, list(order), change

    def __call__(self, images, return_tensors):
        resized, order, change = self.steps
        pixels = np.asarray(images[0].resize((resized, resized), Image.Resampling.BICUBIC), np.float32) / 255
        edge = (resized - 32) // 2
        pixels = change((pixels - 0.4) / 0.25)[edge : edge + 32, edge : edge + 32, order]
        return {"pixel_values": torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]}


def _sharpened(x):
    """Leaves single colors and ramps as they are."""
    return x + 6 * (2 * x - np.roll(x, 3, axis=0) - np.roll(x, -3, axis=0))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_processor_of_unknown_class_is_measured(order):
    student = ViTImageProcessor(size=SQUARE, resample=3)
    seen, own, _ = _seen(student, _Plain(order=order), _image())
    assert ((seen - own).abs().mean() / own.std()).item() < 0.02
    back, mine, _ = _seen(_Plain(32, order), student, _image())  # the other way round
    torch.testing.assert_close(back, mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": (1, 0, 2)}, "mixes the color channels"),
        ({"change": lambda x: x**2}, "gives black|mixes|is not linear"),
        ({"change": lambda x: x - x.mean()}, "gives black and white the same"),
        ({"change": lambda x: x[::-1]}, "does more than resize and crop"),
        ({"change": lambda x: x.transpose(1, 0, 2)}, "does more than resize and crop"),
        ({"change": _sharpened}, "cannot be reproduced"),
    ],
)
def test_arithmetic_that_is_not_described_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        match_pixels(ViTImageProcessor(size=SQUARE), _Plain(32, **options))


@pytest.mark.parametrize(("height", "width"), [(32, 64), (48, 36), pytest.param(64, 32, marks=pytest.mark.slow)])
def test_pixels_that_are_not_square(height, width):
    """ConvNeXt squares them: below 384 by a crop; others keep the proportions or squeeze."""
    student = ViTImageProcessor(do_resize=False, **IMAGENET)
    plain = ViTImageProcessor(do_resize=False), ViTImageProcessor(size=SQUARE), _make("TextNet", {"size": SHORT})
    for teacher in (*plain, _make("ConvNext", {"size": SHORT}), _make("ConvNext", {"size": {"shortest_edge": 384}})):
        seen, own, _ = _seen(student, teacher, _image(height, width))
        assert seen.shape == own.shape
        assert ((seen - own).abs().mean() / own.std()).item() < 0.03, teacher


def test_a_student_that_crops_more_hides_the_border_and_the_note_says_so():
    student, teacher = _make("DeiT", CROPPED["DeiT"]), ViTImageProcessor(size=SQUARE)
    seen, own, notes = _seen(student, teacher, _image())
    assert "the teacher misses the border" in notes[-1]
    assert ((seen - own).abs().mean() / own.std()).item() > 0.05
    both, mine, notes = _seen(student, _make("Levit", CROPPED["Levit"]), _image())
    assert ((both - mine).abs().mean() / mine.std()).item() < 0.03 and "misses" not in notes[-1]


def test_grey_and_color():
    grey = ViTImageProcessor(size=SQUARE, image_mean=[0.3], image_std=[0.2])
    color = ViTImageProcessor(size=SQUARE, **IMAGENET)
    image = _image()
    to_grey = match_pixels(color, grey)[0](_given(color, image))
    torch.testing.assert_close(to_grey, _given(grey, image.convert("L")), rtol=0, atol=0.03)  # PIL rounds to 8 bits
    to_color = match_pixels(grey, color)[0](_given(grey, image.convert("L")))
    torch.testing.assert_close(to_color, _given(color, image.convert("L").convert("RGB")), rtol=1e-5, atol=1e-5)
    teacher = Teacher(build("vit", num_channels=1))
    with pytest.raises(
        ValueError, match=r"the teacher reads 1 channels and is given pixel_values of shape \(2, 3, 32, 32\)"
    ):
        teacher.pixels(torch.randn(2, 3, 32, 32))


def test_numbers_are_those_of_the_file():
    """Measured, and yet the same to the last bit: nothing changes for what was described rightly before."""
    found = PixelFormat.of(ViTImageProcessor(size=SQUARE, **IMAGENET))
    assert found == PixelFormat(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (32, 32), "bilinear")


def test_the_adapter_is_differentiable_twice_through_a_crop():
    formats = (PixelFormat(1 / 255, (0.5,) * 3, (0.5,) * 3, (8, 8), "bilinear"),
               PixelFormat(1 / 255, (0.4,) * 3, (0.2,) * 3, (8, 8), "bicubic", True, (0.8, 0.8)))  # fmt: skip
    adapter = PixelAdapter(*formats)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adapter, pixels) and torch.autograd.gradgradcheck(adapter, pixels)


def test_a_student_of_8_bit_integers_gives_the_teacher_its_own_pixels():
    """A processor that neither rescales nor normalizes gives uint8, which ViT takes; a gain in uint8 would be 0."""
    plain = ViTImageProcessor(size=SQUARE, do_rescale=False, do_normalize=False)
    seen, own, _ = _seen(plain, ViTImageProcessor(size=SQUARE), _image())
    assert _given(plain, _image()).dtype == torch.uint8
    torch.testing.assert_close(seen, own.float(), rtol=1e-5, atol=2e-5)


def test_a_filter_by_the_nearest_pixel_is_the_teachers_too():
    """Number 0, which is not "none named"."""
    student, teacher = ViTImageProcessor(size=SQUARE), ViTImageProcessor(size={"height": 16, "width": 16}, resample=0)
    seen, own, _ = _seen(student, teacher, _image().resize((32, 32)))
    torch.testing.assert_close(seen, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resample", ["bilinear", 17])
def test_what_names_no_filter_is_refused(resample):
    with pytest.raises(ValueError, match=rf"resample {resample!r}, and filters are numbers|fails on a test image"):
        _seen(ViTImageProcessor(size=SQUARE), ViTImageProcessor(size=SQUARE, resample=resample), _image())


def test_a_processor_that_gives_arrays_is_refused_in_words():
    """One written by a user that pays no heed to return_tensors; it failed with an AttributeError."""

    def arrays(images, **_):
        return {"pixel_values": [np.asarray(image, np.float32).transpose(2, 0, 1) for image in images]}

    with pytest.raises(ValueError, match="gives pixel_values as a list where asked for tensors"):
        PixelFormat.of(arrays)
