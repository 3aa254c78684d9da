"""`hf-kdtl distill` with a teacher of which each process reads its own part; started by `launch` with fsdp2.yaml.

python -m tests.distributed.sharded_command_worker OUT ARGUMENTS...
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_kdtl.commands import distill
from hf_kdtl.commands.common import runs
from tests.distributed.sharded_teacher_worker import share
from tests.support.helpers import leave


def shares(argv):
    """Run the command; what this process held of its teacher before the first batch."""
    found, check = [], runs.check_one_batch

    def checked(trainer):
        found.append(share([*trainer.teacher.model.parameters()]))  # afterwards what surrounds its blocks is gathered
        check(trainer)

    runs.check_one_batch = checked
    try:
        distill.main(argv)
    finally:
        runs.check_one_batch = check
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = shares(sys.argv[2:])
    Path(f"{sys.argv[1]}.{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()
