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
# # Notebook: quickstart
#
# A teacher of four blocks on the handwritten digits that scikit-learn carries, and a student of two of its blocks.
# Nothing is downloaded; a CPU takes about a minute.

# %%
import tempfile

from datasets import Image
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
    set_seed,
)

from hf_kdtl import DistillationConfig, DistillationTrainer, make_student
from hf_kdtl.data import ImageDataset, load_images
from hf_kdtl.evaluation import compute_metrics
from hf_kdtl.models import Teacher, plan

set_seed(0)
folder = tempfile.mkdtemp()
images = load_images("digits")
print(len(images.train), "training images,", len(images.test), "test images,", len(images.label_names), "classes")

# %% [markdown]
# ## A teacher
#
# Any image classifier of transformers will do. This one is trained by the plain `Trainer`.

# %%
processor = ViTImageProcessor(size={"height": 16, "width": 16})
train, validation, test = (ImageDataset(split, processor) for split in (images.train, images.validation, images.test))
names = dict(enumerate(images.label_names))
shape = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
teacher = ViTForImageClassification(ViTConfig(num_hidden_layers=4, id2label=names, **shape))
settings = {"max_steps": 200, "per_device_train_batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 20}
quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
arguments = TrainingArguments(f"{folder}/teacher", **settings, **quiet)
trainer = Trainer(teacher, arguments, train_dataset=train, compute_metrics=compute_metrics)
trainer.train()
teacher_accuracy = trainer.predict(test).metrics["test_accuracy"]
print(f"teacher: accuracy {teacher_accuracy:.3f}")

# %% [markdown]
# ## A student
#
# Every second block of the teacher. `plan` shows which block learns from which.

# %%
source = Teacher(teacher, processor)
student = make_student(source, layers=2)
print(plan(student, source))

# %% [markdown]
# ## Distillation
#
# `DistillationTrainer` is `Trainer` with a teacher and a list of objectives.

# %%
objectives = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9}]
config = DistillationConfig(f"{folder}/student", objectives=objectives, **settings, **quiet)
distilled = DistillationTrainer(
    student,
    config,
    teacher=source,
    train_dataset=train,
    eval_dataset=validation,
    processing_class=processor,
    compute_metrics=compute_metrics,
)
distilled.train()
accuracy = distilled.predict(test).metrics["test_accuracy"]
print(f"student of 2 blocks: accuracy {accuracy:.3f}")

# %% [markdown]
# ## What comes out
#
# A plain transformers model, which opens without this package.

# %%
distilled.save_model()
image = images.test.cast_column("image", Image())[0]["image"].convert("RGB")
print(pipeline("image-classification", f"{folder}/student")(image)[0], "true class:", names[images.test[0]["label"]])
