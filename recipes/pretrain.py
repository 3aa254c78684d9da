"""Pretrain a student without labels, from the features of a teacher. Copy this file and edit it.

    python pretrain.py

`hf-kdtl distill --unlabelled <folder> --teacher <model> --student_config ...` does the same, with scores and a report.
"""

from transformers import AutoConfig, AutoModel, ViTImageProcessor, set_seed

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.augment import Augmentation
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.unlabelled import open_images
from hf_kdtl.models import Teacher

IMAGES = "my_images"  # a folder of images in any sub-folders, or parquet files
TEACHER = "facebook/dinov2-small"  # a folder or a name on the Hub, with or without a classifier
STUDENT = {"model_type": "vit", "image_size": 224, "hidden_size": 192, "num_attention_heads": 3,
           "intermediate_size": 768}  # fmt: skip
OBJECTIVES = [{"name": "feature_kd"}, {"name": "similarity", "weight": 0.5}]
AUGMENTATION = {"resized_crop": [0.6, 1.0], "flip": True}


def main(
    images=IMAGES, teacher=TEACHER, student=STUDENT, objectives=OBJECTIVES, augmentation=AUGMENTATION,
    output_dir="runs/pretrained", **settings,
):  # fmt: skip
    """Train, and save the student without a head; `settings` are those of TrainingArguments."""
    teacher = Teacher.from_pretrained(teacher)  # pool="mean" and the like name another embedding
    config = DistillationConfig(output_dir, objectives=objectives, **settings)
    set_seed(config.seed)
    student = AutoModel.from_config(AutoConfig.for_model(**student))
    side, half = student.config.image_size, [0.5, 0.5, 0.5]
    processor = ViTImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half)
    unlabelled = open_images(images, notes=[])
    train = ImageDataset(unlabelled, processor, augmentation=Augmentation(augmentation), view_seed=config.view_seed)
    trainer = DistillationTrainer(student, config, teacher=teacher, train_dataset=train, processing_class=processor)
    trainer.train()
    trainer.save_model()  # AutoModel.from_pretrained opens it, and AutoModelForImageClassification with a new head
    return student


if __name__ == "__main__":
    main(num_train_epochs=20, per_device_train_batch_size=64, learning_rate=1e-3, weight_decay=0.05, warmup_steps=200,
         lr_scheduler_type="cosine", save_strategy="no", seed=1)  # fmt: skip
