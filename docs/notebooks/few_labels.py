# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Notebook: few labels
#
# Ten labelled digits of each class, and the other training images without labels. A student is trained alone, and by a
# teacher's probabilities on all images. One short run of each arm: it shows how, not how much. For a number, use
# several seeds and more steps ([evaluate and compare](../guides/evaluate.md)).

# %%
import tempfile

import numpy as np
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.evaluation import compute_metrics
from hf_kdtl.models import Teacher

folder = tempfile.mkdtemp()
images = load_images("digits")
processor = ViTImageProcessor(size={"height": 16, "width": 16})
test = ImageDataset(images.test, processor)
names = dict(enumerate(images.label_names))


def model(layers: int, seed: int) -> ViTForImageClassification:
    """A ViT with random weights."""
    set_seed(seed)
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, id2label=names, **shape))


settings = {"per_device_train_batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 20, "save_strategy": "no"}
settings |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "no"}

# %% [markdown]
# ## The labels that we have
#
# An image without a label has the label -100.

# %%
labels = np.array(images.train["label"])
keep = np.concatenate([np.flatnonzero(labels == k)[:10] for k in range(10)])
some = np.where(np.isin(np.arange(len(labels)), keep), labels, -100)
labelled_only = ImageDataset(images.train.select(keep), processor)
columns = images.train.remove_columns("label").add_column("label", some.tolist())
all_images = ImageDataset(columns, processor, num_labels=10)
print((some != -100).sum(), "labelled images,", (some == -100).sum(), "without a label")

# %% [markdown]
# ## A teacher
#
# It is trained on all labels here: in practice it is a model that exists already, or one that somebody else paid for.

# %%
arguments = TrainingArguments(f"{folder}/teacher", max_steps=200, **settings)
teacher = model(layers=4, seed=1)
Trainer(teacher, arguments, train_dataset=ImageDataset(images.train, processor)).train()

# %% [markdown]
# ## Alone, and distilled with all images


# %%
def accuracy(objectives, dataset, **sources) -> float:
    """Test accuracy of a student of two blocks."""
    config = DistillationConfig(f"{folder}/student", max_steps=150, objectives=objectives, **settings)
    trainer = DistillationTrainer(
        model(layers=2, seed=2),
        config,
        train_dataset=dataset,
        processing_class=processor,
        compute_metrics=compute_metrics,
        **sources,
    )
    trainer.train()
    return trainer.predict(test).metrics["test_accuracy"]


alone = accuracy([{"name": "task"}], labelled_only)
terms = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9}]
distilled = accuracy(terms, all_images, teacher=Teacher(teacher, processor))
print(f"alone {alone:.3f}, distilled {distilled:.3f}")
