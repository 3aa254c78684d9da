"""Students without a head on two processes: equal to one; and a stream that two processes share."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.test_stream import colors, stream, write_shards
from tests.support.headless import headless
from tests.support.helpers import forked, largest_difference, leave, trainer, weights
from tests.trainer.test_headless import Unlabelled

FEATURES = [
    {"name": "feature_kd", "sample": 8},
    {"name": "similarity", "weight": 0.1},
    {"name": "hidden_states", "layers": [[0, 0]], "weight": 0.1},
]
SGD = {"optim": "sgd", "learning_rate": 0.05, "num_train_epochs": 1}


def train(folder, per_device, name):
    runner = trainer(folder, headless(name), headless("dinov2", seed=3, layers=3), Unlabelled(16), FEATURES,
                     per_device_train_batch_size=per_device, **SGD)  # fmt: skip
    runner.train()
    return runner


def work(out, name):
    torch.set_num_threads(1)
    runner = train(f"{out}.run", 4, name)
    if runner.is_world_process_zero():
        assert runner.args.world_size == 2
        save_file({name: value.contiguous() for name, value in weights(runner.distiller).items()}, out)
    leave()


@pytest.mark.parametrize("name", ["vit", pytest.param("convnext", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path, name):
    one = train(tmp_path / "one", 8, name)
    forked(work, 2, tmp_path / "two.safetensors", name)
    assert largest_difference(weights(one.distiller), load_file(tmp_path / "two.safetensors")) < 1e-6
    assert largest_difference(weights(one.model), weights(headless(name))) > 1e-4


class Noted:
    """A collator that notes which images it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, items):
        self.seen += colors(items)
        return {"pixel_values": torch.stack([item["pixel_values"] for item in items])}


def read(out, shards):
    torch.set_num_threads(1)
    teacher, noted = headless("vit", image_size=8, seed=1), Noted()
    settings = SGD | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}

    def make():
        entries = [{"name": "feature_kd", "standardize": "none"}]
        runner = trainer(f"{out}.run", headless("vit", image_size=8), teacher, stream(shards), entries, **settings)
        runner.data_collator = noted
        return runner

    whole = make()
    whole.train()
    rank, seen = whole.args.process_index, list(noted.seen)
    again = make()
    again.train(resume_from_checkpoint=f"{out}.run/checkpoint-2")
    found = {"world": whole.args.world_size, "seen": seen,
             "difference": largest_difference(weights(whole.distiller), weights(again.distiller))}  # fmt: skip
    with open(f"{out}.{rank}.json", "w") as file:
        json.dump(found, file)
    leave()


def test_two_processes_share_a_stream_and_go_on_with_it(tmp_path):
    shards = write_shards(tmp_path / "shards", rows=6)
    forked(read, 2, tmp_path / "out", shards)
    found = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(2)]
    assert [one["world"] for one in found] == [2, 2] and [one["difference"] for one in found] == [0, 0]
    trained = [one["seen"][-15:][:12] for one in found]
    assert len(set(trained[0])) == len(set(trained[1])) == 12, "a pass of 12 images each"
    assert not set(trained[0]) & set(trained[1])
