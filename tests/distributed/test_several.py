"""Several teachers, and several labels an image: two processes train as one does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_kdtl import DistillationTrainer
from hf_kdtl.models.labels import MULTI_LABEL
from tests.objectives.test_multi_label import Several
from tests.support.helpers import Images, config, forked, largest_difference, leave, weights
from tests.support.tiny import build


def train(folder, kind, per_device):
    settings = {
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.05,
        "per_device_train_batch_size": per_device,
    }
    entries = [{"name": "task"}, {"name": "logit_kd", "teacher": "b"}, {"name": "hidden_states", "teacher": "a"}]
    student, teacher, data = build("vit"), {"a": build("vit", seed=5), "b": build("vit", seed=6)}, Images(16)
    if kind == "labels":
        entries, teacher, data = [{"name": "task"}, {"name": "logit_kd"}], build("vit", seed=5), Several(16)
        student.config.problem_type = teacher.config.problem_type = MULTI_LABEL
    runner = DistillationTrainer(student, config(folder, entries, **settings), teacher=teacher, train_dataset=data)
    runner.train()
    return runner


def work(out, kind):
    torch.set_num_threads(1)
    runner = train(f"{out}.run", kind, 4)
    if runner.is_world_process_zero():
        assert runner.args.world_size == 2
        save_file({name: value.contiguous() for name, value in weights(runner.distiller).items()}, out)
    leave()


@pytest.mark.parametrize("kind", ["teachers", "labels"])
def test_two_processes_equal_one(tmp_path, kind):
    one = train(tmp_path / "one", kind, 8)
    forked(work, 2, tmp_path / "two.safetensors", kind)
    assert largest_difference(weights(one.distiller), load_file(tmp_path / "two.safetensors")) < 1e-6
    assert largest_difference(weights(one.model), weights(build("vit"))) > 1e-4
