"""Labels that the trainer refuses, or counts."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.helpers import Images, trainer
from tests.support.tiny import build


def rows(labels):
    images = Images(len(labels))
    return [{"pixel_values": images.pixels[i], "labels": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize("objectives", [[{"name": "task"}], [{"name": "decoupled_kd"}]])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, 3, 1], "count from 1, subtract 1"),
        ([0, 1, -1, 2], "go from -1 to 2"),
        ([0.0, 1.0, 2.0, 0.0], r"int\(label\)"),
        ([torch.tensor([y]) for y in (0, 1, 2, 0)], r"squeeze\(1\)"),
        ([torch.full((4,), 0.25)] * 4, r"shape \(4, 4\)"),
        ([torch.tensor([100.0, 0, 0])] * 4, "divide them by 100"),
        ([torch.tensor([1.0, 1, 0])] * 4, "multi_label_classification"),
    ],
)
def test_labels_that_are_no_classes_are_refused_in_training_and_evaluation(tmp_path, labels, message, objectives):
    teacher = build("vit", seed=5) if objectives[0]["name"] == "decoupled_kd" else None
    runner = trainer(tmp_path, build("vit"), teacher, rows(labels), objectives, max_steps=1)
    with pytest.raises(ValueError, match=message):
        runner.train()
    with pytest.raises(ValueError, match=message):
        runner.evaluate(rows(labels))


def test_a_loss_of_the_user_reads_whatever_labels_it_likes(tmp_path):
    def multi_label(outputs, labels, num_items_in_batch):
        return F.binary_cross_entropy_with_logits(outputs.logits, labels)

    data = rows([torch.tensor([1.0, 1, 0])] * 4)
    trainer(tmp_path, build("vit"), data=data, max_steps=1, compute_loss_func=multi_label).train()


def test_a_teacher_of_sigmoids_is_refused_where_its_classes_are_compared(tmp_path):
    teacher = build("vit", seed=5)
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"the teacher's problem_type is 'multi_label_classification'.*softmax"):
        trainer(tmp_path, build("vit"), teacher)
    trainer(tmp_path, build("vit"), teacher, objectives=[{"name": "attention_map"}])


@pytest.mark.parametrize("unlabelled", [[*range(4)], [0, 1, 5], [0, 1, 2, 3, 8, 9]])
def test_eval_loss_counts_labelled_images_alone(tmp_path, unlabelled):
    # Batches of 4, 4 and 2 images: a batch without any label, some without, the last without.
    data, student = Images(10), build("vit")
    data.labels[unlabelled] = -100
    with torch.no_grad():
        expected = F.cross_entropy(student.eval()(data.pixels).logits, data.labels).item()
    runner = trainer(tmp_path, student, per_device_eval_batch_size=4)
    assert runner.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert runner.predict(data).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_without_any_label_reports_no_loss(tmp_path):
    data = Images(6)
    data.labels[:] = -100
    assert "eval_loss" not in trainer(tmp_path, build("vit")).evaluate(data)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_class_indices(tmp_path, dtype):
    def losses(kind):
        data = rows([torch.tensor(y, dtype=kind) for y in (0, 1, 1, 0)])
        settings = {"max_steps": 1, "per_device_train_batch_size": 4}
        runner = trainer(tmp_path, build("vit"), build("vit", seed=5), data,
                         [{"name": "task"}, {"name": "decoupled_kd"}], **settings)  # fmt: skip
        runner.train()
        return runner.state.log_history[0]["loss"], runner.evaluate(data)["eval_loss"]

    assert losses(dtype) == losses(torch.int64)
