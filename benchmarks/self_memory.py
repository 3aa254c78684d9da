"""Peak memory of a run with teacher="self" against one with a second copy of the model, each in a process of its own.

python benchmarks/self_memory.py self; python benchmarks/self_memory.py copy

A ViT-B of random weights at 224 px with LoRA, task and logit_kd, two steps of two images.
"""

from __future__ import annotations

import copy
import resource
import sys
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from hf_kdtl import DistillationConfig, DistillationTrainer


def run(which: str) -> None:
    """Train, and print the process's peak: teacher "self", or a "copy"."""
    model = ViTForImageClassification(ViTConfig(num_labels=10))
    teacher = copy.deepcopy(model) if which == "copy" else "self"
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    images = [{"pixel_values": torch.randn(3, 224, 224), "labels": i % 10} for i in range(4)]
    with TemporaryDirectory() as folder:
        config = DistillationConfig(
            folder, objectives=[{"name": "task"}, {"name": "logit_kd"}], max_steps=2, per_device_train_batch_size=2,
            save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        student = get_peft_model(model, lora)
        DistillationTrainer(student, config, teacher=teacher, train_dataset=images).train()
    weights = sum(p.nbytes for p in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{which}: {peak / 1024:.0f} MiB at the peak; the model's weights are {weights / 2**20:.0f} MiB.")


if __name__ == "__main__":
    run(sys.argv[1])
