"""Ours and plain Trainer side by side: equal training, resuming, and loading the best model.

    python benchmarks/against_trainer.py      # about 2 minutes

Largest absolute difference of the weights. "train": 20 steps of AdamW with warm-up and clipping, ours against Trainer.
"resume": a run resumed from its middle, against the undisturbed run. "best": the model that load_best_model_at_end
leaves, against the checkpoint that was best.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_kdtl import DistillationConfig, DistillationTrainer
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

FAMILIES = ["vit", "deit", "dinov2", "swin", "convnext", "resnet"]
TASK = [{"name": "task"}]
RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


class Worse(TrainerCallback):
    """Report a loss that rises, so that the first checkpoint is the best; remember its weights."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)

    def on_save(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            self.best = weights(model)


def runner(cls, folder, model, **settings):
    kind = DistillationConfig if cls is DistillationTrainer else TrainingArguments
    callbacks = settings.pop("callbacks", None)
    return cls(
        copy.deepcopy(model),
        config(folder, TASK, kind, **settings),
        train_dataset=Images(64),
        eval_dataset=Images(8),
        callbacks=callbacks,
    )


def trained(model, accumulation):
    found = []
    for cls in (Trainer, DistillationTrainer):
        batch = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        recipe = {"max_steps": 20, "learning_rate": 1e-3, "warmup_steps": 5, "max_grad_norm": 0.5, **batch}
        one = runner(cls, tempfile.mkdtemp(), model, weight_decay=0.01, **recipe)
        one.train()
        found.append(weights(one.model))
    return largest_difference(*found)


def resumed(cls, model):
    folder = Path(tempfile.mkdtemp())
    full = runner(cls, folder, model, **RUN)
    full.train()
    again = runner(cls, folder, model, **RUN)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return largest_difference(weights(full.model), weights(again.model))


def best(cls, model):
    worse = Worse()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": False, "callbacks": [worse]}
    one = runner(cls, tempfile.mkdtemp(), model, **RUN, **settings)
    one.train()
    return largest_difference(weights(one.model), worse.best)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    columns = ["train", "train, accumulation 2", "resume: Trainer", "resume: ours", "best: Trainer", "best: ours"]
    print("| family | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for family in FAMILIES:
        model = build(family)
        values = [trained(model, 1), trained(model, 2)]
        for measure in (resumed, best):
            values += [measure(cls, model) for cls in (Trainer, DistillationTrainer)]
        print(f"| {family} | " + " | ".join(f"{v:.1e}" if v else "0" for v in values) + " |", flush=True)


if __name__ == "__main__":
    main()
