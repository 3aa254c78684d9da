"""What several test files need: images, quiet training arguments, two named models."""

import copy
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from hf_kdtl import DistillationConfig, DistillationTrainer
from tests.support.tiny import build

CLASSES = 3
KD = [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": 0.7}]


class Images(torch.utils.data.Dataset):
    """Random images; `labels` is "hard", "some" (every third is unlabelled) or "soft"."""

    def __init__(self, number=16, labels="hard", size=32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(number, 3, size, size, generator=generator)
        hard = torch.randint(0, CLASSES, (number,), generator=generator)
        self.labels = hard
        if labels == "some":
            self.labels = torch.where(torch.arange(number) % 3 == 1, -100, hard)
        elif labels == "soft":
            self.labels = torch.softmax(torch.randn(number, CLASSES, generator=generator), -1)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def and_slow(fast, slow):
    """Values of a parametrisation, the second ones in the slow suite alone."""
    return [*fast, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


def config(folder, objectives=KD, kind=DistillationConfig, **settings):
    """Training arguments that print nothing and write nothing."""
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    if kind is DistillationConfig:
        quiet["objectives"] = objectives
    return kind(str(folder), **(quiet | settings))


def pair(student="vit", teacher="vit", **options):
    """A student and a deeper teacher."""
    return build(student, **options), build(teacher, seed=5, **options)


def trainer(folder, model, teacher=None, data=None, objectives=None, **settings):
    """A trainer on a copy of the student, so that runs start from the same weights."""
    entries = objectives or (KD if teacher is not None else [{"name": "task"}])
    extra = {k: settings.pop(k) for k in list(settings) if k in ("eval_dataset", "callbacks", "compute_loss_func")}
    return DistillationTrainer(
        copy.deepcopy(model),
        config(folder, entries, **settings),
        teacher=teacher,
        train_dataset=Images() if data is None else data,
        **extra,
    )


def weights(model):
    """All tensors of a model, as one list of copies."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(a, b):
    """max |a - b| over two state dicts of the same names."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def torchrun(module, processes, *arguments):
    """Run a module of tests on gloo processes of this machine; its errors are shown."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def launch(module, processes, *arguments, file="cpu"):
    """As `torchrun`, through `accelerate launch` and a file that users are given for it."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
    command += ["--config_file", str(root / f"hf_kdtl/configs/launch/{file}.yaml"), "--main_process_port=0"]
    command += ["-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-9000:]


def forked(function, processes, *arguments):
    """Run a function that ends in `leave` on gloo processes that begin as copies of this one: nothing is imported
    again, a tenth of the time of `torchrun` and `launch`. Its errors are raised here."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_all = (function, {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}, *arguments)
    running = torch.multiprocessing.start_processes(_forked, of_all, nprocs=processes, join=False, start_method="fork")
    until = time.monotonic() + 240
    while not running.join(timeout=5):
        if time.monotonic() > until:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{processes} forked processes did not end in 240 s")


def _forked(rank, function, environment, *arguments):
    settings = environment | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in settings.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # the copy knows that it is one process
    function(*arguments)


def leave():
    """End a worker of `forked`, `torchrun` or `launch` once all have written what they have to say.

    At once, and not through Python's exit: on a busy machine gloo's threads abort there now and then ("terminate
    called without an active exception"), whether or not the group was destroyed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
