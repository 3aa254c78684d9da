"""A run towards the start whose ranks begin with other weights; rank 0's are what counts. Started by torchrun.

python -m tests.start_worker OUT
"""

import json
import os
import sys
from pathlib import Path

import torch

from tests.helpers import Images, leave, trainer
from tests.tiny import build

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    objectives = [{"name": "task"}, {"name": "l2_sp"}]
    runner = trainer(
        f"{sys.argv[1]}.run", build("vit", seed=rank), data=Images(16), objectives=objectives, max_steps=1,
        learning_rate=1e-12, per_device_train_batch_size=4,
    )  # fmt: skip
    runner.train()
    start = build("vit", seed=0).state_dict()
    held = runner.distiller.start.model.state_dict()
    found = {"world": runner.args.world_size, "same": all(torch.equal(held[name], start[name]) for name in start)}
    Path(f"{sys.argv[1]}.{rank}.json").write_text(json.dumps(found | {"l2_sp": runner.state.log_history[0]["l2_sp"]}))
    leave()
