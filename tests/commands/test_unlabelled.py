"""Few labels and many images: --labels_per_class, --unlabelled, --labelled_share."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.commands.common.labels import UnlabelledOptions, fewer_labels, training_images
from hf_kdtl.data import load_images
from hf_kdtl.evaluation import read_results
from tests.commands.conftest import CONFIG, QUICK


def distill(command, *extra):
    arguments = ["--teacher", "teacher", "--dataset", "images", "--output_dir", "out", *QUICK, *extra]
    command("distill").main([*arguments, "--student_config", json.dumps(CONFIG)])
    return read_results("out")


def test_three_arms_of_equal_steps_and_their_comparison(command, images, teacher, capsys):
    Path("more/deep").mkdir(parents=True)
    for number in range(9):
        Image.fromarray(np.full((16, 16, 3), 20 * number, dtype=np.uint8)).save(f"more/deep/{number}.png")
    flags = ["--unlabelled", "more", "--labels_per_class", "2", "--baseline", "true", "--seeds", "1", "2"]
    found = distill(command, *flags, "--max_steps", "-1", "--num_train_epochs", "1", "--labelled_share", "0.5")
    assert found["data"]["unlabelled"] == {
        "source": "more", "labelled_images": 6, "unlabelled_images": 9, "labelled_per_batch": 2,
        "unlabelled_per_batch": 2,
    }  # fmt: skip
    message = "every batch of 4 has 2 labelled and 2 unlabelled ones"
    assert message in capsys.readouterr().out and any(message in note for note in found["pairing"]["notes"])
    assert list(found["evaluation"]["models"]) == ["teacher", "alone", "labelled", "distilled"]
    steps = {name: curve[-1]["step"] for name, curve in found["curves"].items()}
    assert len(steps) == 6 and set(steps.values()) == {5}  # 9 unlabelled images, 2 a batch
    pairs = [(one["a"], one["b"]) for one in found["comparison"] if one["split"] == "test"]
    assert pairs == [("labelled", "alone"), ("distilled", "alone"), ("distilled", "labelled")]
    runs = found["evaluation"]["models"]
    one = next(one for one in found["comparison"] if one["a"] == "distilled" and one["split"] == "test")
    gains = [runs["distilled"]["runs"][s]["test"]["accuracy"] - runs["alone"]["runs"][s]["test"]["accuracy"]
             for s in "12"]  # fmt: skip
    assert one["mean"] == pytest.approx(np.mean(gains)) and one["seeds"] == [1, 2]
    report = Path("out/report.md").read_text()
    assert "Distilled, with unlabelled images minus alone, test accuracy" in report and "arms.png" in report


def test_the_student_alone_and_the_labelled_arm_see_labelled_images_only(command, images, teacher):
    module, building = command("common.experiment"), command("common.builders")
    from hf_kdtl.commands.common import arguments as cli

    types = (module.DistillOptions, building.DataOptions, module.DistillationConfig)
    flags = ["--teacher", "teacher", "--dataset", "images", "--output_dir", "out", *QUICK, "--baseline", "true"]
    flags += ["--student_config", json.dumps(CONFIG), "--labels_per_class", "3", "--unlabelled", "rest"]
    study = module.Experiment(*cli.parse(*types, argv=flags))
    sets = {arm: study.trainer(arm, seed, folder).train_dataset for arm, seed, folder in study.runs()}
    labels = {arm: np.array(data.split["label"][:]) for arm, data in sets.items()}
    assert (labels["alone"] >= 0).all() and len(labels["alone"]) == len(labels["labelled"]) == 9
    assert (labels["distilled"] >= 0).sum() == 9 and len(labels["distilled"]) == len(study.data.train) + len(
        study.data.rest
    )
    assert sets["distilled"].labelled_share == 9 / len(labels["distilled"]) and sets["alone"].labelled_share is None


def test_labels_are_kept_by_class_and_seed_and_the_rest_has_none(images):
    data = load_images("images", seed=1)
    one, same, other = (fewer_labels(data, None, 2, seed) for seed in (1, 1, 2))
    labels = np.array(one.train["label"][:])
    assert np.bincount(labels).tolist() == [2, 2, 2] and len(one.rest) == len(data.train) - 6
    assert set(one.rest["label"][:]) == {-100}
    paths = [[image["path"] for image in split["image"]] for split in (one.train, same.train, other.train, one.rest)]
    assert paths[0] == paths[1] != paths[2] and not set(paths[0]) & set(paths[3])
    assert f"6 of {len(data.train)} labelled images of train are used: 2 of each class, seed 1." in one.notes
    every = fewer_labels(data, None, 12, 1)
    assert len(every.train) == len(data.train) and " Fewer of blue " in every.notes[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlabelled": "rest"}, "no training image is left out"),
        ({"labelled_share": 0.5}, "every training image has a label"),
        ({"unlabelled": "images", "labelled_share": 1.5}, "expected a share between 0 and 1"),
        ({"unlabelled": "./nowhere"}, "does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused(command, images, settings, message):
    data, options = load_images("images"), command("common.builders").DataOptions()
    with pytest.raises(ValueError, match=message):
        training_images(data, UnlabelledOptions(**settings), options, [])
    with pytest.raises(ValueError, match="expected one of them"):
        fewer_labels(data, 10, 2, 0)


def test_a_number_of_images_that_leaves_a_class_without_a_share_is_refused(images, table):
    data = load_images("images")
    total = len(data.train)
    assert [len(fewer_labels(data, number, None, 0).train) for number in (3, total - 3, total)] == [
        3,
        total - 3,
        total,
    ]
    for number in (2, total - 2, total + 1):
        with pytest.raises(ValueError, match=rf"is {number}, expected 3 to {total - 3}, .* or {total} \(all of train"):
            fewer_labels(data, number, None, 0)
    rare = replace(data, train=data.train.select([*np.flatnonzero(np.array(data.train["label"][:]) > 0), 0]))
    with pytest.raises(ValueError, match=r"a class has one image in train.*labels_per_class"):
        fewer_labels(rare, 10, None, 0)
    several = load_images("images.csv", multi_label=True)
    few = fewer_labels(several, len(several.train) - 1, None, 0)
    assert len(few.train) == len(several.train) - 1 and "are used, at random, seed 0." in few.notes[-1]


@pytest.mark.parametrize("name", ["distill", "preflight", "probe", "tune"])
def test_unlabelled_images_without_labelled_ones_are_not_put_beside_the_digits(name, command, teacher, images):
    flags = ["--teacher", "teacher", "--unlabelled", "images", "--output_dir", "out", "--student_layers", "1"]
    with pytest.raises(ValueError, match="type --dataset <labelled images>"):
        command(name).main([*flags, "--objectives", "logit_kd"])
    assert not Path("out").exists()
