"""Runs of the trainer, of one process or of sharded ones; started by `launch` with fsdp2.yaml.

python -m tests.distributed.fsdp_trainer_worker NAME FOLDER CHECKPOINT
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import Images, leave, pair, trainer

OBJECTIVES = [
    {"name": "task", "weight": 0.3},
    {"name": "logit_kd", "weight": 0.7},
    {"name": "hidden_states", "weight": 0.5},
    {"name": "jacobian", "weight": 0.1, "estimator": "split"},
]
RUN = {
    "max_steps": 4,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # or rounding decides the step of tensors with hardly any gradient
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_objectives": True,
    "load_best_model_at_end": True,
    "eval_on_start": True,
    "metric_for_best_model": "first",
    "greater_is_better": False,
}
WAYS = {
    "run": {},
    "llrd": {"layer_rates": {"mode": "llrd", "decay": 0.5}},
    "checkpointing": {CHECKPOINTING: True, "objectives": OBJECTIVES[:3]},
    "bf16": {"bf16": True, "optim": "sgd", "learning_rate": 0.1},
}


def finished(name, folder, checkpoint=None):
    """A trainer after its run; its best checkpoint is the first."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    student, teacher = pair()
    settings = RUN | WAYS[name] | {"per_device_train_batch_size": 4 // world}
    settings["per_device_eval_batch_size"] = 4 // world
    objectives = settings.pop("objectives", OBJECTIVES)
    runner = trainer(folder, student, teacher, Images(24), objectives, eval_dataset=Images(8, seed=1), **settings)
    runner.compute_metrics = lambda _: {"first": float(runner.state.global_step)}
    torch.manual_seed(0)
    runner.train(resume_from_checkpoint=checkpoint)
    return runner


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, checkpoint = sys.argv[1], Path(sys.argv[2]), (sys.argv[3:] or [None])[0]
    runner = finished(name, folder, checkpoint)
    held = [p for module in (runner.model, runner.teacher.model.vit.layers) for p in module.parameters()]
    assert all(isinstance(p, DTensor) for p in held)
    log = [*runner.state.log_history]
    metrics = runner.evaluate()
    logits = runner.predict(Images(8, seed=1)).predictions
    runner.save_model(str(folder / "final"))
    if runner.is_world_process_zero():
        message = {"world": runner.args.world_size, "log": log, "metrics": metrics}
        (folder / "reported.json").write_text(json.dumps(message | {"logits": logits.tolist()}))
    leave()
