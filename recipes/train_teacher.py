"""Fine-tune an image classifier on your own images, to be a teacher. Copy this file and edit it.

    python train_teacher.py

`hf-kdtl train-teacher` does the same, and also checks, resumes, reports and draws.
"""

from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor, set_seed

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.augment import Augmentation
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.evaluation.metrics import compute_metrics

DATASET = "digits"  # or a folder with one folder of images for each class, parquet files, a name on the Hub
VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3,
       "intermediate_size": 192, "hidden_dropout_prob": 0.0}  # fmt: skip
AUGMENTATION = {"crop": 1}


def main(dataset=DATASET, vit=VIT, augmentation=AUGMENTATION, output_dir="runs/teacher", **settings):
    """Train, print the accuracy on the test images, and save; `settings` are those of TrainingArguments."""
    images = load_images(dataset)  # validation and test splits are cut from train where there are none

    # A model with random weights. To fine-tune one: AutoModelForImageClassification.from_pretrained(name, ...) with
    # AutoImageProcessor.from_pretrained(name), and images.in_order(model) if it already knows these classes.
    labels = dict(enumerate(images.label_names))
    shape = AutoConfig.for_model("vit", **vit, id2label=labels, label2id={name: i for i, name in labels.items()})
    config = DistillationConfig(output_dir, objectives=["task"], **settings)
    set_seed(config.seed)
    model = AutoModelForImageClassification.from_config(shape)
    size = {"height": vit["image_size"], "width": vit["image_size"]}
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    # The image processor decides about size and values; augmentation comes before its normalization.
    train = ImageDataset(images.train, processor, augmentation=Augmentation(augmentation), view_seed=config.view_seed)
    validation, test = (ImageDataset(split, processor) for split in (images.validation, images.test))
    trainer = DistillationTrainer(
        model,
        config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.save_model()  # with the image processor: pipeline("image-classification", output_dir) opens it
    print(trainer.predict(test).metrics["test_accuracy"])
    return model


if __name__ == "__main__":
    main(num_train_epochs=30, per_device_train_batch_size=64, learning_rate=1e-3, weight_decay=0.05, warmup_steps=50,
         lr_scheduler_type="cosine", eval_strategy="epoch", save_strategy="no", seed=1)  # fmt: skip
