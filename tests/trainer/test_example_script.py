"""The shape of transformers' examples/pytorch/image-classification/run_image_classification.py, with our class."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

# Under its usual name it asks for torchvision before transformers 5.18, also where Pillow does the work.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer_utils import get_last_checkpoint

from hf_kdtl import DistillationConfig, DistillationTrainer
from tests.support.helpers import largest_difference, weights
from tests.support.tiny import build

QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True}


def pictures(number, seed):
    rng = np.random.default_rng(seed)
    labels = [i % 2 for i in range(number)]
    images = [PIL.Image.fromarray(rng.integers(0, 128, (40, 48, 3), np.uint8) + 127 * label * np.ones((), np.uint8))
              for label in labels]  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    pytest.importorskip("PIL")
    from transformers import ViTImageProcessor

    folder = tmp_path_factory.mktemp("model")
    build("vit").save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def main(kind, folder, model_path, resume=False, **given):
    """run_image_classification.py from `load_dataset` to `trainer.save_model`, without its command line."""
    arguments = DistillationConfig if kind is DistillationTrainer else TrainingArguments
    training_args = arguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        remove_unused_columns=False, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        seed=1337, **QUIET, **{k: given.pop(k) for k in ("objectives",) if k in given},
    )  # fmt: skip
    dataset = datasets.DatasetDict(train=pictures(16, 0), validation=pictures(8, 1))

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    labels = dataset["train"].features["label"].names
    label2id, id2label = {}, {}
    for i, label in enumerate(labels):
        label2id[label] = str(i)
        id2label[str(i)] = label

    def compute_metrics(p):
        return {"accuracy": (np.argmax(p.predictions, axis=1) == p.label_ids).mean()}

    config = AutoConfig.from_pretrained(
        model_path,
        num_labels=len(labels),
        label2id=label2id,
        id2label=id2label,
        finetuning_task="image-classification",
    )
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(model_path, config=config, ignore_mismatched_sizes=True)
    image_processor = AutoImageProcessor.from_pretrained(model_path)

    def transforms(example_batch):
        example_batch["pixel_values"] = [
            torch.as_tensor(image_processor(image.convert("RGB"))["pixel_values"][0])
            for image in example_batch["image"]
        ]
        return example_batch

    dataset["train"].set_transform(transforms)
    dataset["validation"].set_transform(transforms)
    trainer = kind(
        model=model, args=training_args, train_dataset=dataset["train"], eval_dataset=dataset["validation"],
        compute_metrics=compute_metrics, processing_class=image_processor, data_collator=collate_fn, **given,
    )  # fmt: skip
    train_result = trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if resume else None)
    trainer.save_model()
    trainer.log_metrics("train", train_result.metrics)
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(finetuned_from=str(model_path), tasks="image-classification", dataset="pictures")
    return trainer, metrics


def test_the_example_is_the_same_to_the_bit_with_our_class(tmp_path, model_path):
    plain, ours = (
        main(kind, tmp_path / kind.__name__, model_path, **given)
        for kind, given in ((Trainer, {}), (DistillationTrainer, {"objectives": [{"name": "task"}]}))
    )
    assert largest_difference(weights(plain[0].model), weights(ours[0].model)) == 0.0
    assert plain[1]["eval_accuracy"] == ours[1]["eval_accuracy"]
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "DistillationTrainer")
    assert largest_difference(weights(saved), weights(ours[0].model)) == 0.0
    assert saved.config.id2label == {0: "cat", 1: "dog"}
    # The example continues from the last checkpoint in output_dir, here one of plain Trainer's.
    again, _ = main(DistillationTrainer, tmp_path / "Trainer", model_path, True, objectives=[{"name": "task"}])
    assert again.state.global_step == 8


def test_the_example_distils(tmp_path, model_path):
    teacher = build("vit", seed=5, num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    objectives = [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": 0.7}]
    made, metrics = main(DistillationTrainer, tmp_path, model_path, objectives=objectives, teacher=teacher)
    assert made.state.log_history[0]["logit_kd"] > 0 and metrics["eval_accuracy"] == 1.0
