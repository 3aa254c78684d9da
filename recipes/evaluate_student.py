"""Measure a student by more than accuracy, next to its teacher. Copy this file and edit it.

    python evaluate_student.py

`hf-kdtl evaluate` measures more: cost, degraded images, intervals, and a report that says what is lost and gained.
"""

import torch
from transformers import AutoModelForImageClassification

from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.evaluation.fidelity import fidelity
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.models import Teacher
from hf_kdtl.models.labels import match_labels
from hf_kdtl.models.teachers.processor_files import open_processor


def logits_of(model, split, batch_size=32):
    """(logits, labels) of a split."""
    model.eval()
    batches = torch.utils.data.DataLoader(split, batch_size)
    with torch.inference_mode():
        pairs = [(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]) for batch in batches]
    return tuple(torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))


def main(dataset="digits", student="runs/student", teacher="runs/teacher"):
    """Print and return {metric: value} of the student on the test images."""
    teacher = Teacher.from_pretrained(teacher)
    model = AutoModelForImageClassification.from_pretrained(student)
    images = load_images(dataset).in_order(model)

    # Each model sees the images through its own image processor.
    processor = open_processor(student)
    test = ImageDataset(images.test, processor)
    logits, labels = logits_of(model, test)
    its, _ = logits_of(teacher.classifier(), ImageDataset(images.test, teacher.processing_class))
    order, _ = match_labels(model.config, teacher.provenance())  # None: the same classes in the same order
    found = paired_scores(logits, labels, teacher=its if order is None else its[:, order])

    # What the teacher's answers do not show: features, attention and input gradients.
    pixels = (batch["pixel_values"] for batch in torch.utils.data.DataLoader(test, 32))
    found["jacobian_cosine"] = fidelity(model, teacher, pixels, processor)["jacobian_cosine"]
    for name, value in found.items():
        print(f"{name:<24}{value:.4f}")
    return found


if __name__ == "__main__":
    main()
