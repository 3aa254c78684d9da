"""Under FSDP2 each process reads its own part of a teacher that is given by its path."""

import json
from pathlib import Path

import pytest

from hf_kdtl.evaluation.results import read_results
from tests.commands.conftest import CONFIG, QUICK, images, teacher  # noqa: F401
from tests.distributed.sharded_command_worker import shares
from tests.distributed.sharded_teacher_worker import CASES, facts, finished
from tests.support.headless import headless
from tests.support.helpers import launch
from tests.support.tiny import build

pytestmark = pytest.mark.slow


def test_no_process_holds_the_teacher_whole_and_it_teaches_the_same(tmp_path):
    build("vit", seed=5, layers=3).save_pretrained(tmp_path / "classifier")
    headless("dinov2", seed=5, layers=3).save_pretrained(tmp_path / "headless")
    launch("tests.distributed.sharded_teacher_worker", 2, tmp_path / "two", tmp_path, file="fsdp2")
    two = [json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in range(2)]
    for case in CASES:
        one = facts(*finished(tmp_path / f"one-{case}", case, str(tmp_path / case), 8))
        assert one["share"] == 1
        for found in two:
            assert found[case]["share"] <= 0.55, "a part of the tensors of every block"
            assert found[case]["fingerprint"] == one["fingerprint"]
            assert found[case]["loss"] == pytest.approx(one["loss"], rel=1e-4)


COMMANDS = {
    "classifier": ["--dataset", "images", "--objectives", "task", "logit_kd", "hidden_states"],
    "headless": ["--unlabelled", "images"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_does_not_hold_it_whole_either(case, images, teacher, tmp_path):  # noqa: F811
    """The figures are those of one process with the batches of two."""
    if case == "headless":
        headless("dinov2", image_size=16, layers=3).save_pretrained(teacher)
    flags = [str(Path(flag).absolute()) if flag == images else flag for flag in COMMANDS[case]]
    flags += ["--teacher", str(Path(teacher).absolute()), "--student_config", json.dumps(CONFIG), *QUICK]
    flags += ["--logging_steps", "1", "--optim", "sgd", "--warmup_steps", "0", "--learning_rate", "0.05"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert shares([*flags, "--per_device_train_batch_size", "8", "--output_dir", str(one)]) == [1]
    launch("tests.distributed.sharded_command_worker", 2, two, *flags, "--output_dir", two, file="fsdp2")
    held = [json.loads(Path(f"{two}.{rank}.json").read_text()) for rank in range(2)]
    assert all(len(share) == 1 and share[0] <= 0.55 for share in held)
    alone, spread = read_results(one), read_results(two)
    losses = [[row["loss"] for row in run["curves"]["distilled-seed42"] if "loss" in row] for run in (alone, spread)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert spread["models"]["teacher"] == alone["models"]["teacher"]
    notes = [*spread["pairing"]["notes"], *spread["data"]["notes"]]
    assert any("is spread over the processes" in note for note in notes)
    if case == "headless":
        scored = alone["embedding"]["models"]["teacher"], spread["embedding"]["models"]["teacher"]
        assert scored[1] == scored[0]
        return
    runs = [run["evaluation"]["models"]["teacher"]["runs"]["teacher"]["test"] for run in (alone, spread)]
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
