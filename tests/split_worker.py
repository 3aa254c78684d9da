"""One run whose weights are written to a file; started by torchrun with one or two processes.

python -m tests.split_worker OUT PER_DEVICE ACCUMULATION LABELS
"""

import json
import sys

import torch
from safetensors.torch import save_file

from hf_kdtl.objectives import OBJECTIVES
from tests.helpers import Images, pair, trainer, weights


def per_image_objectives(labels):
    """Every registered objective that does not depend on the split and takes these labels, at equal weight."""
    kinds = [
        (n, c) for n, c in OBJECTIVES.items() if c.reduction == "image" and (c.takes_soft_labels or labels != "soft")
    ]
    return [{"name": name, "weight": 0.5} for name, _ in kinds]


def run(folder, per_device, accumulation, labels, number=16, **settings):
    student, teacher = pair()
    runner = trainer(
        folder,
        student,
        teacher,
        Images(number, labels),
        per_image_objectives(labels),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.5,
        num_train_epochs=1,
        **settings,
    )
    runner.train()
    return runner


if __name__ == "__main__":
    out, per_device, accumulation, labels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    finished = run(f"{out}.run", per_device, accumulation, labels)
    logged = [
        {k: v for k, v in line.items() if k in finished.distiller.weights} for line in finished.state.log_history
    ]
    if finished.is_world_process_zero():
        tensors = {k: v.contiguous() for k, v in weights(finished.distiller).items()}
        save_file(tensors, out, metadata={"world": str(finished.args.world_size), "logged": json.dumps(logged)})
    finished.end()  # else gloo's threads may abort the process at its exit
