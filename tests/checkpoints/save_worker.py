"""A run of several processes that saves; started by torchrun. What each process met is in OUT.<rank>.json.

python -m tests.checkpoints.save_worker OUT FOLDER [SETTINGS as JSON]
    resume        true: continue from the last complete checkpoint; a list: what each rank is asked
    breaks        true: the list of files cannot even be looked at
    fails         [rank, step]: the random state of that rank cannot be written in the save of that step
    killed        [rank, count]: that rank is killed at its count-th file
"""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import torch

import hf_kdtl.checkpoints.state
import hf_kdtl.trainer.checkpointing
from tests.checkpoints.writers import wrap_writers
from tests.support.helpers import Images, leave, trainer
from tests.support.tiny import build


def instrument(runner, fails, killed):
    count = 0

    def wrapped(function, place):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if killed == [runner.args.process_index, count]:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if fails == [runner.args.process_index, runner.state.global_step]:
                os.truncate(args[place], 10)
                raise OSError(errno.ENOSPC, "No space left on device")
            return result

        return call

    wrap_writers(wrapped)


def main(out, folder, resume=False, fails=None, killed=None, breaks=False):
    torch.set_num_threads(1)
    runner = trainer(
        folder,
        build("vit", hidden_dropout_prob=0.1),
        build("vit", seed=5, hidden_size=48, num_attention_heads=3),
        Images(20),
        [{"name": "task"}, {"name": "hidden_states"}],
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        layer_rates={"mode": "discrepancy", "source": "attention", "every": 3},
        gradient_rule={"name": "never_hurt"},
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=Images(4),
        metric_for_best_model="loss",  # where Trainer has a barrier in the middle of a save
    )
    instrument(runner, fails, killed)
    if breaks:
        hf_kdtl.trainer.checkpointing.resolve_checkpoint = None  # a fault of ours, on whichever process decides
    resume = resume[runner.args.process_index] if isinstance(resume, list) else resume
    try:
        runner.train(resume_from_checkpoint=resume)
        message = ""
    except (OSError, ValueError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    met = {"message": message, "step": runner.state.global_step, "world": runner.args.world_size}
    Path(f"{out}.{runner.args.process_index}.json").write_text(json.dumps(met))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
