"""A teacher given by its path to the trainer, of one process or of sharded ones; started by `launch` with fsdp2.yaml.

python -m tests.distributed.sharded_teacher_worker OUT FOLDER OBJECTIVES
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.support.headless import headless
from tests.support.helpers import Images, leave, trainer
from tests.support.tiny import build

CASES = {
    "classifier": [{"name": "task"}, {"name": "logit_kd"}, {"name": "hidden_states"}],
    "headless": [{"name": "feature_kd", "sample": 8}],
}


def finished(folder, case, path, per_device):
    student = build("vit") if case == "classifier" else headless("dinov2")
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2, "per_device_train_batch_size": per_device}
    runner = trainer(folder, student, path, Images(16), CASES[case], **settings)
    held = [p for p in runner.teacher.model.parameters()]
    runner.train()
    return runner, held


def share(held):
    """What this process holds of parameters."""
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in held)
    return local / sum(p.numel() for p in held)


def facts(runner, held):
    return {
        "share": share(held),
        "fingerprint": runner.teacher.fingerprint,
        "loss": [entry["loss"] for entry in runner.state.log_history if "loss" in entry],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for case in CASES:
        found[case] = facts(*finished(f"{out}.{case}.run", case, str(folder / case), 4))
    Path(f"{out}.{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()
