"""Runs that are killed and resumed until they are finished; each is a fork of this process, which has all imported.

python -m tests.checkpoints.kill_worker FOLDER KILLS SEED        prints what happened as JSON, in its last line
"""

import gc
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_kdtl.checkpoints.manifest import verify
from hf_kdtl.checkpoints.rotation import checkpoints
from hf_kdtl.checkpoints.state import STATE_JSON, TENSORS
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation
from tests.checkpoints.writers import wrap_writers
from tests.data.test_dataset import noisy
from tests.support.helpers import trainer
from tests.support.tiny import build

STEPS = 30  # 7.5 epochs
KINDS = ("at a random time", "before a file", "inside a file")
LATE = "after the last save"


def images():
    """Augmented by the package's own ImageDataset, whose draws belong to the image and the epoch. (Draws from the
    global generators could not be repeated: accelerate reads one batch ahead of what a checkpoint holds.)"""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return ImageDataset(
        noisy(20), processor, augmentation=Augmentation({"flip": True, "crop": 4, "color_jitter": 0.3})
    )


def train(folder):
    """As the recipes continue a run."""
    runner = trainer(
        folder,
        build("vit", hidden_dropout_prob=0.1),
        build("vit", seed=5, hidden_size=48, num_attention_heads=3),
        images(),
        [{"name": "task"}, {"name": "logit_kd"}, {"name": "hidden_states"}],
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        layer_rates={"mode": "discrepancy", "source": "attention", "every": 3},
        gradient_rule={"name": "never_hurt"},
        resume_from_checkpoint="true",
    )
    importlib.import_module("hf_kdtl.commands.common.runs")._train(runner, runner.args)
    return runner


# ---- Inside the fork ----


def instrument(kind, when, fraction, report):
    """Announce each thing that is done to a folder; be killed before the `when`-th, or in the middle of its file."""
    count = 0

    def wrapped(function, place):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            os.write(report, b"+")
            if kind == "before a file" and count == when:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            path = Path(args[place])
            if kind == "inside a file" and count >= when and path.is_file() and str(path) != "/dev/null":
                os.truncate(path, int(fraction * path.stat().st_size))
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(report, b"-")
            return result

        return call

    wrap_writers(wrapped)
    Path.write_text = wrapped(Path.write_text, 0)
    Path.rename = wrapped(Path.rename, 0)
    shutil.rmtree = wrapped(shutil.rmtree, 0)


def child(folder, kind, when, fraction, report):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    text = logging.FileHandler(folder / "log.txt")
    logging.getLogger("hf_kdtl.trainer.checkpointing").addHandler(text)
    instrument(kind, when, fraction, report)
    os.write(report, b".")
    model = train(folder / "run").model
    if kind == LATE:
        os.kill(os.getpid(), signal.SIGKILL)
    model.save_pretrained(folder / "model")
    os._exit(0)


# ---- Outside of it ----


def attempt(folder, kind="never", when=0, fraction=0.0, after=None):
    """Train in a fork; kill it after some seconds of training. (Whether it was killed, whether inside a save.)"""
    read, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            child(folder, kind, when, fraction, report)
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)
    os.close(report)
    if after is not None:
        seen = os.read(read, 1)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    else:
        seen = b""
    while part := os.read(read, 1 << 16):
        seen += part
    os.close(read)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True, seen.count(b"+") > seen.count(b"-")
    assert status == 0, f"a run failed instead of being killed: {status}"
    return False, False


def outcome(folder, step=STEPS):
    """Everything that a finished run leaves: weights, projectors, optimizer, rates, rule, random states and log."""
    last = folder / "run" / f"checkpoint-{step}"
    state = json.loads((last / "trainer_state.json").read_text())
    log = [{k: v for k, v in e.items() if not k.endswith(("runtime", "per_second"))} for e in state["log_history"]]
    return {
        "student": safetensors.torch.load_file(last / "model.safetensors"),
        "projectors": safetensors.torch.load_file(last / f"{TENSORS}.safetensors"),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(last / "scheduler.pt", weights_only=True),
        "random": {p.name: torch.load(p, weights_only=False) for p in sorted(last.glob("rng_state*.pth"))},
        "distillation": json.loads((last / STATE_JSON).read_text()),
        "log": log,
    }


def ended(folder):
    """`outcome`, and the model that the run ended with, as it was in memory."""
    return outcome(folder) | {"the model": safetensors.torch.load_file(folder / "model" / "model.safetensors")}


def same(a, b):
    """Bitwise, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


def lose_a_block(run, draw):
    """What a disk does to a checkpoint that was complete: zeros in one of its files. Not to the only complete one."""
    complete = [checkpoint for checkpoint in checkpoints(run) if not verify(checkpoint)]
    if len(complete) < 2:
        return False
    path = draw.choice([path for path in sorted(complete[-1].iterdir()) if path.is_file()])
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    changed = bytes(content) != path.read_bytes()
    path.write_bytes(content)
    return changed


def chain(folder, kills, draw, seconds):
    """Kill a run up to `kills` times, resuming it after each, and twice when it was finished; then let it finish:
    [(kind, inside a save, damaged)]."""
    folder.mkdir()
    done = []
    while len(done) < kills:
        kind = KINDS[draw.randrange(3)]
        after = draw.uniform(0, 0.8 * seconds) if kind == KINDS[0] else None
        killed, inside = attempt(folder, kind, draw.randint(1, 70), draw.choice([0.0, draw.random()]), after)
        if not killed:
            break
        done.append((kind, inside, draw.random() < 0.3 and lose_a_block(folder / "run", draw)))
    shutil.rmtree(folder / "model", ignore_errors=True)
    for damage in (draw.random() < 0.5, False):
        done.append((LATE, attempt(folder, LATE)[1], damage and lose_a_block(folder / "run", draw)))
    attempt(folder)
    return done


def main(folder, kills, seed):
    torch.set_num_threads(1)
    importlib.import_module("hf_kdtl.commands.common.runs")
    gc.freeze()  # accelerate collects before each run: not through all that was imported
    draw = random.Random(seed)
    began = time.time()
    (folder / "undisturbed").mkdir()
    attempt(folder / "undisturbed")
    seconds = time.time() - began
    expected = ended(folder / "undisturbed")
    done, different, skipped, finished, chains = [], [], 0, 0, 0
    while sum(kind != LATE for kind, _, _ in done) < kills:
        here = folder / f"chain{chains}"
        done += chain(here, 6, draw, seconds)
        found = ended(here)
        different += [f"{here.name}: {key}" for key in expected if not same(expected[key], found[key])]
        text = (here / "log.txt").read_text()
        skipped, finished = skipped + text.count("is skipped"), finished + text.count("training is already complete")
        chains += 1
    count = {kind: sum(k == kind for k, _, _ in done) for kind in (*KINDS, LATE)}
    report = {"kills": sum(count[kind] for kind in KINDS), "by_kind": count, "chains": chains}
    report["inside_a_save"] = sum(i for _, i, _ in done)
    report |= {"damaged_afterwards": sum(d for _, _, d in done), "resumed_when_finished": finished}
    print(json.dumps(report | {"skipped": skipped, "different": different, "seconds": time.time() - began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
