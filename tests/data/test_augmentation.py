import pytest
import torch

from hf_kdtl.data.augmentation import Augmentation, soft_labels


def coloured(count: int, height: int = 12, width: int = 10) -> torch.Tensor:
    """Image i is constant, of value i / count."""
    return (torch.arange(count) / count)[:, None, None, None].expand(count, 3, height, width).contiguous()


ALL = {"crop": 2, "flip": True, "color_jitter": 0.3, "random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("config", [*({key: value} for key, value in ALL.items()), {"resized_crop": [0.5, 1.0]}, ALL])
def test_shape_range_and_change(config, batch):
    torch.manual_seed(1)
    pixels, labels = torch.rand(batch, 3, 12, 10), torch.arange(batch) % 5
    before = pixels.clone()
    changed, new_labels = Augmentation(config)(pixels, labels, 5)
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.float32
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert torch.equal(pixels, before)
    assert new_labels.shape == ((batch, 5) if {"mixup", "cutmix"} & set(config) else (batch,))
    if batch > 1:
        assert not torch.equal(changed, pixels)


def test_empty_and_switched_off():
    augmentation = Augmentation({"crop": 0, "flip": False, "mixup": None, "cutmix": 0.0})
    pixels, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, -100])
    same, same_labels = augmentation(pixels, labels, 3)
    assert torch.equal(same, pixels)
    assert torch.equal(same_labels, labels)
    assert not augmentation.mixes


def test_crop_shifts_by_at_most_the_padding():
    torch.manual_seed(0)
    pixels = torch.zeros(200, 3, 9, 9)
    pixels[:, :, 4, 4] = 1
    changed, _ = Augmentation({"crop": 2})(pixels, torch.zeros(200, dtype=torch.long), 2)
    places = changed[:, 0].nonzero()
    assert len(places) == 200
    assert sorted(set(places[:, 1].tolist())) == sorted(set(places[:, 2].tolist())) == [2, 3, 4, 5, 6]
    padded, _ = Augmentation({"crop": 2})(torch.ones(200, 3, 9, 9), torch.zeros(200, dtype=torch.long), 2)
    assert padded.unique().tolist() == [0, 1]


def test_flip_mirrors_left_and_right_in_half_of_the_images():
    torch.manual_seed(0)
    pixels = torch.rand(400, 3, 4, 4)
    changed, _ = Augmentation({"flip": True})(pixels, torch.zeros(400, dtype=torch.long), 2)
    mirrored = (changed == pixels.flip(-1)).flatten(1).all(1)
    assert (mirrored | (changed == pixels).flatten(1).all(1)).all()
    assert 160 < mirrored.sum() < 240


def test_erasing_puts_a_grey_box_with_the_probability():
    torch.manual_seed(0)
    changed, _ = Augmentation({"random_erasing": 0.25})(
        torch.zeros(400, 3, 16, 16), torch.zeros(400, dtype=torch.long), 2
    )
    assert changed.unique().tolist() == [0, 0.5]
    assert 70 < changed.flatten(1).any(1).sum() < 130


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_labels_weigh_as_the_pixels_do(key):
    # Constant images with one class each: the mean of the mixture is the mean of the values under its label.
    torch.manual_seed(0)
    pixels, labels = coloured(32), torch.arange(32)
    mixed, soft = Augmentation({key: 1.0})(pixels, labels, 32)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(32))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ (torch.arange(32) / 32))
    own = soft[torch.arange(32), labels]
    assert ((own > 0.01) & (own < 0.99)).sum() > 20
    if key == "cutmix":  # only whole pixels of the two images, in one box
        torch.testing.assert_close((mixed == pixels).float().mean((1, 2, 3)), own)


def test_mixup_draws_its_weight_from_beta():
    torch.manual_seed(0)
    pixels, labels = torch.rand(2000, 3, 2, 2), torch.arange(2000)
    for alpha in (0.2, 8.0):
        own = Augmentation({"mixup": alpha})(pixels, labels, 2000)[1].diagonal()
        assert own.mean().item() == pytest.approx(0.5, abs=0.03)
        assert own.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)  # the variance of Beta(a, a)


def test_both_mixes_come_equally_often():
    torch.manual_seed(0)
    augmentation = Augmentation({"mixup": 8.0, "cutmix": 1.0})
    pixels, labels = coloured(8), torch.arange(8)
    # A mixup of constant images is constant; a cut is not.
    flat = sum(bool((augmentation(pixels, labels, 8)[0].std((1, 2, 3)) < 1e-6).all()) for _ in range(200))
    assert 70 < flat < 130


def test_a_batch_of_one_mixes_with_itself():
    for key in ("mixup", "cutmix"):
        pixels = torch.rand(1, 3, 8, 8)
        mixed, soft = Augmentation({key: 1.0})(pixels, torch.tensor([2]), 4)
        torch.testing.assert_close(mixed, pixels)
        torch.testing.assert_close(soft, torch.tensor([[0.0, 0.0, 1.0, 0.0]]))


def test_mixtures_with_an_unlabelled_image_are_unlabelled():
    torch.manual_seed(0)
    pixels, labels = coloured(16), torch.tensor([-100, *range(15)])
    for key in ("mixup", "cutmix"):
        _, soft = Augmentation({key: 1.0})(pixels, labels, 15)
        unlabelled = (soft == -100).all(1)
        assert unlabelled[0]
        assert 1 <= unlabelled.sum() <= 2  # the image itself and the one that it was mixed into
        torch.testing.assert_close(soft[~unlabelled].sum(1), torch.ones(int((~unlabelled).sum())))


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
