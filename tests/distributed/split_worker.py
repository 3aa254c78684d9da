"""One run whose weights are written to a file, and each rank's layer rates to OUT.<rank>.json; started by `forked`,
or by accelerate launch with one or two processes.

python -m tests.distributed.split_worker OUT PER_DEVICE ACCUMULATION LABELS [SETTINGS as JSON]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_kdtl.objectives import OBJECTIVES
from tests.support.helpers import Images, leave, pair, trainer, weights
from tests.support.representations import complete


def per_image_objectives(labels, teacher):
    """Every registered objective that does not depend on the split and takes these labels, at equal weight."""
    kinds = {n: c for n, c in OBJECTIVES.items() if c.reduction == "image" or c.of_weights}
    names = [name for name, kind in kinds.items() if kind.takes_soft_labels or labels != "soft"]
    return [{"name": name, "weight": 0.5} | complete(name, {}, teacher) for name in names]


def run(folder, per_device, accumulation, labels, number=16, objectives=None, **settings):
    student, teacher = pair()
    runner = trainer(
        folder,
        student,
        teacher,
        Images(number, labels),
        objectives or per_image_objectives(labels, teacher),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        **{"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.5, "num_train_epochs": 1} | settings,
    )
    runner.train()
    return runner


def work(out, per_device, accumulation, labels, settings):
    """What a process does."""
    torch.set_num_threads(1)
    if "eval_strategy" in settings:
        settings["eval_dataset"] = Images(4)
    finished = run(f"{out}.run", per_device, accumulation, labels, **settings)
    kept = {*finished.distiller.weights, "learning_rate"}
    logged = [{k: v for k, v in line.items() if k in kept} for line in finished.state.log_history]
    if finished.layer_rates is not None:
        Path(f"{out}.{finished.args.process_index}.json").write_text(json.dumps(finished.layer_rates.history))
    if finished.is_world_process_zero():
        tensors = {k: v.contiguous() for k, v in weights(finished.distiller).items()}
        metadata = {"world": str(finished.args.world_size), "logged": json.dumps(logged)}
        save_file(tensors, out, metadata=metadata)
    leave()


if __name__ == "__main__":
    settings = json.loads(sys.argv[5]) if len(sys.argv) > 5 else {}
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], settings)
