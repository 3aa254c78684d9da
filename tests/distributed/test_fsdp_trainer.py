"""The trainer under FSDP2, on two processes: its weights, checkpoints and figures against those of one process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_kdtl.checkpoints.manifest import verify
from hf_kdtl.checkpoints.state import TENSORS
from tests.distributed.fsdp_trainer_worker import WAYS, finished
from tests.support.helpers import Images, largest_difference, launch

pytestmark = pytest.mark.slow
TOLERANCE = {"checkpointing": 1e-5, "run": 1e-5, "llrd": 1e-5, "bf16": 2e-4}


def sharded(name, folder, *checkpoint):
    """What a run on two processes reported."""
    launch("tests.distributed.fsdp_trainer_worker", 2, name, folder, *checkpoint, file="fsdp2")
    message = json.loads((folder / "reported.json").read_text())
    assert message["world"] == 2
    return message


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (folder on one process, its trainer, folder on two, what it reported)}, each made when asked for."""
    made, root = {}, tmp_path_factory.mktemp("fsdp")

    def run(name):
        if name not in made:
            one, two = root / f"{name}-one", root / f"{name}-two"
            made[name] = one, finished(name, one), two, sharded(name, two)
            assert made[name][1].args.world_size == 1
        return made[name]

    return run


def tensors(checkpoint):
    """Every tensor of a checkpoint: of the student, the objectives and the optimizer."""
    student = load_file(checkpoint / "model.safetensors") | load_file(checkpoint / f"{TENSORS}.safetensors")
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{i}.{k}": v for i, values in state.items() for k, v in values.items() if v is not None}
    return {"weights": student} | ({"moments": moments} if moments else {})


@pytest.mark.parametrize("name", WAYS)
def test_the_checkpoints_are_those_of_one_process(runs, name):
    one, _, two, _ = runs(name)
    for step in ("checkpoint-2", "checkpoint-4"):
        assert not verify(two / step)
        expected, found = tensors(one / step), tensors(two / step)
        for what, values in expected.items():
            assert largest_difference(values, found[what]) < TOLERANCE[name], (step, what)
        groups = [torch.load(run / step / "optimizer.pt", weights_only=True)["param_groups"] for run in (one, two)]
        assert groups[0] == groups[1]
    moved = largest_difference(tensors(two / "checkpoint-2")["weights"], tensors(two / "checkpoint-4")["weights"])
    assert moved > 10 * TOLERANCE[name]


@pytest.mark.parametrize("name", WAYS)
def test_the_figures_are_those_of_one_process(runs, name):
    _, runner, _, message = runs(name)
    compared = 0
    for mine, theirs in zip(runner.state.log_history, message["log"], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            if not key.endswith(("runtime", "per_second")):
                assert theirs[key] == pytest.approx(mine[key], rel=100 * TOLERANCE[name], abs=1e-5), key
                compared += 1
    assert compared > 40


def test_the_best_one_is_loaded_and_saved_clean(runs):
    _, runner, two, message = runs("run")
    best, final = (load_file(two / name / "model.safetensors") for name in ("checkpoint-2", "final"))
    assert largest_difference(best, final) == 0
    student = AutoModelForImageClassification.from_pretrained(two / "final").eval()
    assert type(student) is type(runner.model) and student.config.architectures == [type(student).__name__]
    with torch.no_grad():
        logits = student(torch.stack([image["pixel_values"] for image in Images(8, seed=1)])).logits
    assert (logits - torch.tensor(message["logits"])).abs().max() < 1e-5
    assert message["metrics"]["eval_loss"] == pytest.approx(runner.evaluate()["eval_loss"], abs=1e-5)


def test_a_fresh_launch_goes_on_bitwise(runs, tmp_path):
    _, _, two, message = runs("run")
    shutil.copytree(two / "checkpoint-2", tmp_path / "run/checkpoint-2")
    again = sharded("run", tmp_path / "run", tmp_path / "run/checkpoint-2")
    expected, found = tensors(two / "checkpoint-4"), tensors(tmp_path / "run/checkpoint-4")
    for what, values in expected.items():
        assert largest_difference(values, found[what]) == 0, what
    assert [e["loss"] for e in again["log"] if "loss" in e] == [e["loss"] for e in message["log"] if "loss" in e]


def test_one_process_goes_on_from_a_sharded_checkpoint(runs, tmp_path):
    one, _, two, _ = runs("run")
    shutil.copytree(two / "checkpoint-2", tmp_path / "run/checkpoint-2")
    finished("run", tmp_path / "run", str(tmp_path / "run/checkpoint-2"))
    expected, found = tensors(one / "checkpoint-4"), tensors(tmp_path / "run/checkpoint-4")
    assert largest_difference(expected["weights"], found["weights"]) < 1e-5
