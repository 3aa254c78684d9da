"""What is drawn for each view, and the shares of pixels and labels in mixtures."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from hf_kdtl.data.augmentation import Augmentation, Part, Shift, soft_labels

ALL = {"crop": 2, "flip": True, "color_jitter": 0.3, "random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}


def draws(config, rows=400, view=0, seed=0):
    augmentation = Augmentation(config)
    return [augmentation.draw(seed, view, row) for row in range(rows)]


def test_a_draw_depends_on_seed_view_and_row_alone():
    augmentation = Augmentation(ALL)
    first = augmentation.draw(3, 4, 5)
    np.random.random(3), torch.rand(3)
    augmentation.draw(3, 4, 6)
    assert Augmentation(ALL).draw(3, 4, 5) == first
    others = [augmentation.draw(*other) for other in ((4, 4, 5), (3, 5, 5), (3, 4, 6), (5, 4, 3), (3, 5, 4))]
    assert all(other != first for other in others)


@pytest.mark.parametrize("key", ALL)
def test_no_key_changes_the_draws_of_another(key):
    without = {name: value for name, value in ALL.items() if name != key}
    fields = {"crop": "shift", "color_jitter": "factors", "random_erasing": "erased", "mixup": "mixing"}
    own = fields.get("mixup" if key == "cutmix" else key, key)
    for full, less in zip(draws(ALL, 50), draws(without, 50), strict=True):
        kept = {field.name for field in dataclasses.fields(full)} - {own}
        assert all(getattr(full, name) == getattr(less, name) for name in kept)
        assert less.mixing is None or less.mixing.partner == full.mixing.partner


def test_empty_and_switched_off():
    augmentation = Augmentation({"crop": 0, "flip": False, "mixup": None, "cutmix": 0.0})
    assert augmentation.draw(0, 0, 0) == Augmentation({}).draw(1, 1, 1)
    assert not augmentation.mixes and augmentation.config == {}


def test_a_crop_of_whole_pixels_shifts_by_each_number_equally_often():
    down, right = zip(*(one.shift.shares((8, 16)) for one in draws({"crop": 2}, 1000)), strict=True)
    for shares, side in ((down, 8), (right, 16)):
        times = np.unique(np.array(shares) * side, return_counts=True)
        assert times[0].tolist() == [-2, -1, 0, 1, 2] and times[1].min() > 150
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.1
    with pytest.raises(ValueError, match="'crop' is 8, expected less than a side: 8 pixels"):
        Shift(8, 0.5, 0.5).shares((8, 16))


def test_a_crop_of_a_share_is_uniform_in_it():
    down = np.array([one.shift.shares((8, 16))[0] for one in draws({"crop": 0.25}, 1000)])
    assert -0.25 <= down.min() < -0.24 and 0.24 < down.max() < 0.25 and abs(down.mean()) < 0.02


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 300), (64, 64)])
def test_a_resized_crop_keeps_its_share_of_the_area_inside_the_image(width, height):
    for area in ([0.3, 1.0], [1.0, 1.0], [0.08, 0.08]):
        for one in draws({"resized_crop": area}, 200):
            left, top, right, bottom = one.part.box(width, height)
            assert left >= 0 and top >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
            assert (right - left) * (bottom - top) / (width * height) == pytest.approx(one.part.area)
            assert area[0] <= one.part.area <= area[1]
            aspect = (right - left) / (bottom - top)
            free = one.part.area * max(width / height, height / width) < 0.75
            assert not free or 0.75 <= aspect <= 4 / 3 + 1e-9
    assert Part(0.25, 1.0, 0.0, 1.0).box(100, 100) == (50, 0, 100, 50)


def test_flips_and_erasures_come_with_their_probability():
    assert 160 < sum(one.flip for one in draws({"flip": True})) < 240
    boxes = [one.erased for one in draws({"random_erasing": 0.25}) if one.erased]
    assert 70 < len(boxes) < 130
    for top, left, bottom, right in boxes:
        assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
        assert 0.02 <= (bottom - top) * (right - left) <= 0.33 + 1e-9


def test_colors_change_by_at_most_the_setting():
    factors = np.array([one.factors for one in draws({"color_jitter": 0.3})])
    assert factors.shape == (400, 3) and factors.min() > 0.7 and factors.max() < 1.3
    assert (np.abs(factors.mean(0) - 1) < 0.03).all() and (factors.std(0) > 0.15).all()


def test_mixup_draws_its_weight_from_beta_and_its_partner_evenly():
    for alpha in (0.2, 8.0):
        mixing = [one.mixing for one in draws({"mixup": alpha}, 2000)]
        weights = np.array([one.weight for one in mixing])
        assert weights.mean() == pytest.approx(0.5, abs=0.03)
        assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)  # the variance of Beta(a, a)
        assert all(one.box is None for one in mixing)
        assert np.histogram([one.partner for one in mixing], 4, (0, 1))[0].min() > 420


def test_a_cut_has_the_area_that_beta_drew_where_it_is_inside_the_image():
    for one in (one.mixing for one in draws({"cutmix": 1.0})):
        top, left, bottom, right = one.box
        assert 0 <= top <= bottom <= 1 and 0 <= left <= right <= 1
        area = (bottom - top) * (right - left)
        inside = min(top, left) > 0 and max(bottom, right) < 1
        assert area == pytest.approx(1 - one.weight) if inside else area <= 1 - one.weight + 1e-9
        assert not inside or bottom - top == pytest.approx(math.sqrt(1 - one.weight))


def test_both_mixes_come_equally_often():
    assert 160 < sum(one.mixing.box is None for one in draws({"mixup": 8.0, "cutmix": 1.0})) < 240


def test_soft_labels_by_hand():
    weight = torch.tensor([0.75, 0.5, 0.5])
    soft = soft_labels(torch.tensor([0, 2, 1]), torch.tensor([1, -100, 1]), weight, 3)
    assert soft.tolist() == [[0.75, 0.25, 0], [-100, -100, -100], [0, 1, 0]]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"cutmx": 1.0}, "unknown key of augmentation: 'cutmx'. Did you mean 'cutmix'.*mixup, cutmix"),
        ({"zzz": 0}, "unknown key of augmentation: 'zzz'"),
        ({"crop": 1.5}, "'crop' is 1.5, expected a whole number"),
        ({"crop": True}, "'crop' is True"),
        ({"crop": -1}, "'crop' is -1"),
        ({"resized_crop": [1.0, 0.6]}, "'resized_crop' is .*smallest, largest"),
        ({"resized_crop": 0.6}, "'resized_crop' is 0.6"),
        ({"flip": "yes"}, "'flip' is 'yes', expected true or false"),
        ({"color_jitter": 2}, "'color_jitter' is 2"),
        ({"random_erasing": 1.1}, "'random_erasing' is 1.1, expected a probability"),
        ({"mixup": -0.2}, "'mixup' is -0.2"),
        ({"mixup": float("nan")}, "'mixup' is nan"),
        ({"cutmix": "1.0"}, "'cutmix' is '1.0', expected an alpha"),
        ({"crop": 4, "resized_crop": [0.5, 1]}, "both 'crop' and 'resized_crop'"),
        (["crop"], "expected a mapping"),
    ],
)
def test_bad_values_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        Augmentation(config)
