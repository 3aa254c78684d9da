"""Under FSDP2 each process reads its own part of a teacher that is given by its path."""

import json

import pytest

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
