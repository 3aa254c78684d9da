"""A store whose writer is killed at any instant is continued to the bytes of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_stores_that_were_killed_equal_one_that_was_not(tmp_path):
    command = [sys.executable, "-m", "tests.data.store_worker", str(tmp_path), "30"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] >= 12 and report["inside"] >= 8 and report["parts"] >= 5, report
    assert report["different"] == []


@pytest.mark.slow
def test_a_run_that_fills_its_store_is_killed_and_continued(tmp_path):
    command = [sys.executable, "-m", "tests.data.store_worker", str(tmp_path), "24", "training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] >= 16 and report["inside"] >= 4, report
    assert report["different"] == []  # neither the store nor the student


@pytest.mark.slow
def test_two_processes_write_the_store_of_one(tmp_path):
    from tests.data.store_worker import tree

    save_teacher(tmp_path / "teacher")
    settings = {
        "dataset": "digits", "image_size": "16", "train_images": "300", "teacher": str(tmp_path / "teacher"),
        "teacher_batch": "8", "views": "2", "use_cpu": "true", "augmentation": '{"flip": true}', "max_gb": "1",
        "objectives": "logit_kd", "disable_tqdm": "true",
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "hf_kdtl.commands.cache", "--output", str(tmp_path / str(processes))]
        command += [word for name, value in settings.items() for word in (f"--{name}", value)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def save_teacher(folder):
    from hf_kdtl.models.labels import set_class_names
    from tests.support.tiny import build

    model = build("vit", image_size=16, num_labels=10)
    set_class_names(model.config, [str(digit) for digit in range(10)])
    model.save_pretrained(folder)
