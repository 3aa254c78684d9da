"""What a card is made from where a trainer has no results.json of its own."""

import pytest
import torch
from datasets import Dataset as HFDataset
from torch.utils.data import ConcatDataset, Subset

from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.evaluation.results import update_results
from hf_kdtl.hub.model_card import student_card
from hf_kdtl.hub.provenance import student_hash
from hf_kdtl.hub.trainer_results import _unlabelled, results_of
from tests.support.helpers import Images, pair, trainer


@pytest.mark.parametrize("greater", [False, True])
def test_the_figures_are_of_the_student_as_it_is_and_of_eval_dataset(greater):
    student, _ = pair()
    run = trainer("out", student, max_steps=2, eval_dataset=Images(8, seed=1), eval_strategy="steps", eval_steps=1,
                  save_strategy="steps", save_steps=1, learning_rate=0.03, load_best_model_at_end=True,
                  metric_for_best_model="nll", greater_is_better=greater)  # fmt: skip
    run.compute_metrics = compute_metrics
    run.train()
    first, last = (entry["eval_nll"] for entry in run.state.log_history if "eval_nll" in entry)

    def shown():
        found = results_of(run)
        models = found["evaluation"].get("models")
        return models["distilled"]["runs"]["42"]["validation"]["nll"] if models else found["data"]["notes"]

    assert (
        shown()
        == (max if greater else min)(first, last)
        == pytest.approx(run.predict(Images(8, seed=1))[2]["test_nll"])
    )
    run.evaluate(Images())  # of other images, whatever they are
    assert shown() == (max if greater else min)(first, last)
    assert run.evaluate()["eval_nll"] == shown()
    run.eval_dataset = Images(4, seed=2)
    (note,) = shown()
    assert "no evaluation is of eval_dataset and of the student as it is (step" in note
    assert run.evaluate()["eval_nll"] == shown()


def test_a_trainers_card_counts_images_without_labels_and_says_that_it_measured_rounded():
    student, _ = pair()
    run = trainer("out", student, max_steps=1, eval_dataset=Images(4), quantize="int8")
    run.train_dataset.split = HFDataset.from_dict({"label": [0] * 6 + [-100] * 10})  # as an ImageDataset has it
    run.compute_metrics = compute_metrics
    assert "8 bits" not in student_card(results_of(run)).text
    run.evaluate()
    text = student_card(results_of(run)).text
    assert "It was measured in numbers of 8 bits (quantize)" in text and "quantize: int8" in text
    assert "trained without a teacher on 6 labelled and 10 unlabelled images." in text


def test_images_without_labels_are_counted_inside_of_what_holds_them():
    images = Images(5)
    images.split = HFDataset.from_dict({"label": [0, -100, 1, -100, 2]})
    taken = Subset(images, [0, 1, 2])
    assert _unlabelled(taken) == {"labelled_images": 2, "unlabelled_images": 1}
    assert _unlabelled(Subset(taken, [0, 2])) == {}
    assert _unlabelled(ConcatDataset([taken, images])) == {"labelled_images": 5, "unlabelled_images": 3}
    assert _unlabelled(ConcatDataset([images, Images(2)])) == {}  # of the others nothing is known


def test_a_trainers_data_may_be_a_split_of_datasets():
    student, _ = pair()
    images = Images(4)
    rows = HFDataset.from_dict({"image": [item["pixel_values"].numpy() for item in images],
                                "labels": [int(item["labels"]) for item in images]}, split="train")  # fmt: skip
    rows.set_transform(lambda batch: {"pixel_values": torch.tensor(batch["image"]), "labels": batch["labels"]})
    run = trainer("out", student, max_steps=1, remove_unused_columns=False)
    run.train_dataset = rows
    run.train()
    assert "trained without a teacher on 4 images." in student_card(results_of(run)).text


def test_figures_of_several_splits_are_not_on_the_card_and_it_says_so():
    student, _ = pair()
    run = trainer("out", student, max_steps=1, eval_dataset={"a": Images(4), "b": Images(6)})
    run.compute_metrics = compute_metrics
    run.evaluate()
    found = results_of(run)
    assert found["evaluation"] == {} and "validation" not in found["data"]["sizes"]
    (note,) = found["data"]["notes"]
    assert "eval_dataset has 2 splits" in note and note in student_card(found).text
    run.eval_dataset = run.eval_dataset["b"]
    run.evaluate()
    assert "on 6 validation images" in student_card(results_of(run)).text


def test_a_trainers_notes_name_no_folder_and_keep_their_words():
    student, teacher = pair()
    teacher.config._name_or_path = "runs/vit/model"
    run = trainer("out", student, teacher, max_steps=1)
    run.distiller.notes.append("runs/vit/model was made from train/validation/test")
    assert "vit was made from train/validation/test" in results_of(run)["pairing"]["notes"]


def test_a_trainer_that_measured_nothing_says_so():
    student, _ = pair()
    card = student_card(results_of(trainer("out", student, max_steps=1)))
    assert "**Accuracy:** not measured." in card.text and "trained without a teacher" in card.text
    assert "same source" not in card.text  # of test images that are none
    assert "it always predicts one of its" in card.text
    student.config.problem_type = "multi_label_classification"
    card = student_card(results_of(trainer("out", student, max_steps=1)))
    assert "classes apart, and for nothing else" in card.text and "per class on average" not in card.text
    assert card.data.eval_results is None and "knowledge-distillation" not in card.data.tags


def test_results_of_the_folder_are_taken_if_they_are_of_this_run():
    student, teacher = pair()
    run = trainer("out", student, teacher, objectives=[{"name": "task", "weight": 0.1}, {"name": "logit_kd"}])
    update_results("out", "run", {"recipe": "distill"})
    update_results("out", "objectives", run.args.entries)
    for another in ({}, {"fingerprint": None}, {"fingerprint": "0" * 32}):  # of a student with the same objectives
        update_results("out", "models", {"student": another})
        assert results_of(run)["run"]["recipe"] is None
    update_results("out", "models", {"student": {"fingerprint": student_hash(student)}})
    assert results_of(run)["run"] == {"recipe": "distill"}
    update_results("out", "run", {"recipe": "evaluate_student"})  # not of a training: left alone
    assert results_of(run)["run"]["recipe"] is None
