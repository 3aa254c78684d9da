"""Stores whose writer is killed, continued, and compared with one that was not disturbed.

python -m tests.data.store_worker FOLDER KILLS        prints what happened as JSON, in its last line
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

from hf_kdtl.data import store
from hf_kdtl.models import Needs, Teacher
from tests.support.helpers import Images
from tests.support.tiny import build

NEEDS = Needs(logits=True, pooled=True, hidden_states=frozenset({1}))


def write(folder):
    request = store.Request(NEEDS, teacher_batch=4)
    writer = store.StoreWriter(folder, Teacher(build("vit", seed=5)), Images(64), request)
    writer.begin()
    writer.write()


def child(folder):
    """The process id of a fork that writes."""
    if pid := os.fork():
        return pid
    write(folder)
    os._exit(0)


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main(folder, kills):
    torch.set_num_threads(1)
    store.MOST_IMAGES = 8  # 8 blocks
    draws, whole = random.Random(0), folder / "whole"
    started = time.perf_counter()
    os.waitpid(child(whole), 0)
    seconds, expected = time.perf_counter() - started, tree(whole)
    report = {"kills": 0, "inside": 0, "parts": 0, "shards_left": [], "different": []}
    for number in range(kills):
        part = folder / "part"
        pid = child(part)
        time.sleep(draws.uniform(0.2, 1) * seconds)
        os.kill(pid, signal.SIGKILL)
        report["kills"] += os.waitpid(pid, 0)[1] == signal.SIGKILL
        left = tree(part) if part.exists() else {}
        report["parts"] += any(name.endswith(".part") for name in left)
        complete = [name for name in left if name.endswith(".npy") and "/" in name]
        report["inside"] += 0 < len(complete) < sum("/view" in name for name in expected)
        report["shards_left"].append(len(complete))
        if any(left[name] != expected[name] for name in complete):
            report["different"].append(f"{number}: a complete shard")
        os.waitpid(child(part), 0)
        if tree(part) != expected:
            report["different"].append(f"{number}: the continued store")
        shutil.rmtree(part)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
