"""Stores whose writer is killed, continued, and compared with one that was not disturbed.

python -m tests.data.store_worker FOLDER KILLS [training]     prints what happened as JSON, in its last line

With `training` the writer is a run that fills its store while it trains, and it is continued from its checkpoint.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from hf_kdtl.data import store
from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers.store import partial
from tests.data import test_filling
from tests.support.helpers import Images
from tests.support.tiny import build

NEEDS = Needs(logits=True, pooled=True, hidden_states=frozenset({1}))


def write(folder):
    request = store.Request(NEEDS, teacher_batch=4)
    writer = store.StoreWriter(folder, Teacher(build("vit", seed=5)), Images(64), request)
    writer.begin()
    writer.write()


def train(folder):
    """18 steps over 2 views of 22 images: 4 batches a pass, each view is met twice, so a kill's loss is written."""
    os.makedirs(folder / "out", exist_ok=True)
    os.chdir(folder)
    source = test_filling.filling("auto")
    try:
        found = test_filling.trained(source, 18, resume=get_last_checkpoint("out") and True, save_steps=2)
    except ValueError as error:  # killed in the first save
        assert "No complete checkpoint" in str(error), error
        found = test_filling.trained(source, 18, save_steps=2)
    source.flush()
    Path("weights").write_bytes(b"".join(tensor.numpy().tobytes() for tensor in found.values()))
    shutil.rmtree("out")  # checkpoints hold times


def child(folder, work):
    """The process id of a fork that works."""
    if pid := os.fork():
        return pid
    work(folder.absolute())
    os._exit(0)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards(folder):
    """How many shards of views are complete."""
    return len(list(folder.glob("**/view*/**/*.npy"))) if folder.exists() else 0


def killed(pid, folder, number, pause):
    """kill -9 a moment after so many shards are complete; whether it was still at work."""
    while shards(folder) < number and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(pause)
    try:
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    except (ProcessLookupError, ChildProcessError):  # it had ended, and was waited for above
        return False


def main(folder, kills, work=write):
    torch.set_num_threads(1)
    store.MOST_IMAGES = 8  # 8 blocks, or 3
    partial.SECONDS = 0.05
    draws, whole = random.Random(0), folder / "whole"
    started = time.perf_counter()
    os.waitpid(child(whole, work), 0)
    seconds, expected = time.perf_counter() - started, tree(whole)
    total = sum("/view" in name and name.endswith(".npy") for name in expected)
    report = {"kills": 0, "inside": 0, "parts": 0, "shards_left": [], "different": []}
    for number in range(kills):
        part = folder / "part"
        pid = child(part, work)
        # By what is written and not by the clock: the instants stay inside on a machine of any speed.
        report["kills"] += killed(pid, part, draws.randrange(total), draws.uniform(0, 0.1) * seconds)
        left = tree(part) if part.exists() else {}
        report["parts"] += any(name.endswith(".part") for name in left)
        complete = [name for name in left if name.endswith(".npy") and "/view" in name]
        report["inside"] += 0 < len(complete) < total
        report["shards_left"].append(len(complete))
        if any(left[name] != expected[name] for name in complete):
            report["different"].append(f"{number}: a complete shard")
        os.waitpid(child(part, work), 0)
        continued = tree(part)
        names = sorted(n for n in continued.keys() | expected.keys() if continued.get(n) != expected.get(n))
        report["different"] += [f"{number}: {name} of the continued one" for name in names]
        shutil.rmtree(part)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), train if sys.argv[3:] == ["training"] else write)
