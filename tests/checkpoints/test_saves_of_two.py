"""Two processes save, fail, are killed and resume together."""

import json
import os
import shutil

import pytest

from hf_kdtl.checkpoints.manifest import verify
from hf_kdtl.checkpoints.rotation import checkpoints
from tests.checkpoints.kill_worker import outcome, same
from tests.support.helpers import torchrun

pytestmark = pytest.mark.slow


def start(out, folder, **settings):
    torchrun("tests.checkpoints.save_worker", 2, out, folder, json.dumps(settings))
    met = [json.loads(out.with_name(f"{out.name}.{rank}.json").read_text()) for rank in (0, 1)]
    assert [m["world"] for m in met] == [2, 2]
    return met


def steps(folder):
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    met = start(folder / "out", folder / "run")
    assert [m["message"] for m in met] == ["", ""] and met[0]["step"] == 8
    last = folder / "run" / "checkpoint-8"
    assert verify(last) == [] and (last / "rng_state_0.pth").is_file() and (last / "rng_state_1.pth").is_file()
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_cannot_write_all_end_with_the_same_sentence_and_resume(tmp_path, undisturbed, rank):
    met = start(tmp_path / "out", tmp_path / "run", fails=[rank, 4])
    for one in met:
        assert "checkpoint-4 could not be written and was removed: [Errno 28] No space" in one["message"], met
        assert "checkpoint-2: free some space" in one["message"]
    assert steps(tmp_path / "run") == [2]
    assert [one["message"] for one in start(tmp_path / "out", tmp_path / "run", resume=True)] == ["", ""]
    found, expected = outcome(tmp_path, 8), outcome(undisturbed, 8)
    assert [key for key in expected if not same(expected[key], found[key])] == []


def test_a_lost_random_state_of_one_process_makes_all_use_the_one_before(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-8" / "rng_state_1.pth").unlink()
    assert [one["message"] for one in start(tmp_path / "out", tmp_path / "run", resume=True)] == ["", ""]
    found, expected = outcome(tmp_path, 8), outcome(undisturbed, 8)
    assert [key for key in expected if not same(expected[key], found[key])] == []


def test_two_processes_that_are_killed_end_as_if_they_never_were(tmp_path, undisturbed):
    for killed in ([0, 9], [1, 2], [0, 5], [1, 1]):
        resume = any((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
        with pytest.raises(AssertionError):
            start(tmp_path / "out", tmp_path / "run", resume=resume, killed=killed)
    resume = any((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
    start(tmp_path / "out", tmp_path / "run", resume=resume)
    found, expected = outcome(tmp_path, 8), outcome(undisturbed, 8)
    assert [key for key in expected if not same(expected[key], found[key])] == []
    assert os.listdir(tmp_path / "run")


def test_two_processes_that_are_not_asked_the_same_or_meet_a_fault_end_together(tmp_path, undisturbed):
    checkpoint = str(undisturbed / "run" / "checkpoint-8")
    for met in start(tmp_path / "out", undisturbed / "run", resume=[checkpoint, None]):
        assert met["message"].startswith("ValueError: resume_from_checkpoint is '/")
        assert "'None' on 1." in met["message"]
    found = [met["message"] for met in start(tmp_path / "out", undisturbed / "run", resume=True, breaks=True)]
    assert found == ["RuntimeError: TypeError: 'NoneType' object is not callable"] * 2


def test_two_processes_whose_run_is_finished_make_no_further_step(tmp_path, undisturbed):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    met = start(tmp_path / "out", tmp_path / "run", resume=True)
    assert [(one["message"], one["step"]) for one in met] == [("", 8)] * 2 and steps(tmp_path / "run") == [6, 8]
