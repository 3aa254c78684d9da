"""Distil a student cut out of its teacher, from the labels and the teacher's answers. Copy this file and edit it.

    python distill.py

`hf-kdtl distill` does the same, for several seeds and with the student alone for comparison.
"""

from transformers import set_seed

from hf_kdtl import DistillationConfig, DistillationTrainer, make_student
from hf_kdtl.augment import Augmentation
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.models import Teacher

DATASET = "digits"  # or a folder with one folder of images for each class, parquet files, a name on the Hub
TEACHER = "runs/teacher"  # a folder or a name on the Hub; train_teacher.py makes this one
OBJECTIVES = [
    {"name": "task", "weight": 0.1},
    {"name": "logit_kd", "weight": 0.9, "temperature": 4.0},
    # {"name": "attention_transfer", "weight": 10.0},     any of hf_kdtl.objectives.OBJECTIVES
]
AUGMENTATION = {"crop": 1}


def main(
    dataset=DATASET, teacher=TEACHER, layers=2, objectives=OBJECTIVES, augmentation=AUGMENTATION,
    output_dir="runs/student", **settings,
):  # fmt: skip
    """Train, print the accuracy on the test images, and save; `settings` are those of TrainingArguments."""
    teacher = Teacher.from_pretrained(teacher)  # with its image processor
    config = DistillationConfig(output_dir, objectives=objectives, **settings)
    set_seed(config.seed)
    student = make_student(teacher, layers)  # so many of the teacher's blocks, its embeddings and its head, copied
    images = load_images(dataset).in_order(student)  # classes matched by name

    processor = teacher.processing_class  # the student may have another: the teacher's pixels are then converted
    train = ImageDataset(images.train, processor, augmentation=Augmentation(augmentation), view_seed=config.view_seed)
    validation, test = (ImageDataset(split, processor) for split in (images.validation, images.test))
    trainer = DistillationTrainer(
        student,
        config,
        teacher=teacher,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()  # a plain transformers model
    print(trainer.predict(test).metrics["test_accuracy"])
    return student


if __name__ == "__main__":
    main(num_train_epochs=20, per_device_train_batch_size=64, learning_rate=1e-3, weight_decay=0.05, warmup_steps=40,
         lr_scheduler_type="cosine", eval_strategy="epoch", save_strategy="no", seed=1)  # fmt: skip
