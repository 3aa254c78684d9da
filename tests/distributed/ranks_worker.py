"""What `check_ranks` says on each of two processes; started by `launch`.

python -m tests.distributed.ranks_worker OUT
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch

from hf_kdtl.trainer.process_checks import check_ranks
from tests.support.helpers import Images, leave, trainer
from tests.support.tiny import build


def message(runner, **changed):
    """The refusal, with some settings of this process changed."""
    before, runner.args = runner.args, copy.copy(runner.args)
    for name, value in changed.items():
        setattr(runner.args, name, value)
    try:
        check_ranks(runner)
    except ValueError as error:
        return str(error)
    finally:
        runner.args = before
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    runner = trainer(f"{sys.argv[1]}.run", build("vit"), data=Images(16), per_device_train_batch_size=4)
    cases = {
        "equal": message(runner),
        "of a rank": message(runner, logging_dir=f"logs/{rank}", local_rank=rank),
        "seed": message(runner, seed=42 + rank),
        "objectives": message(runner, objectives=[{"name": "task", "weight": 1.0 + rank}]),
    }
    runner.train_dataset = Images(16 - rank)
    cases["images"] = message(runner)
    runner.train_dataset = Images(1)
    cases["fewer images"] = message(runner)
    runner.train_dataset, runner.model = Images(16), build("vit", layers=2 + rank)
    cases["student"] = message(runner)
    Path(f"{sys.argv[1]}.{rank}.json").write_text(json.dumps(cases | {"world": runner.args.world_size}))
    leave()
