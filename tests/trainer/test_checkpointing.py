"""A checkpoint is complete or is not used: what is found damaged, what a save that fails leaves, what is removed."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers.modeling_utils
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

import hf_kdtl.checkpoints.state
from hf_kdtl import DistillationTrainer
from hf_kdtl.checkpoints.manifest import FILES, UNLISTED, read_manifest, verify, write_manifest
from hf_kdtl.checkpoints.rotation import back_up, checkpoints, latest_complete, resolve_checkpoint, to_prune
from hf_kdtl.checkpoints.state import STATE_JSON, TENSORS
from hf_kdtl.trainer import checkpointing
from hf_kdtl.trainer.checkpointing import CheckpointingTrainer
from tests.support.helpers import Images, config, largest_difference, trainer, weights
from tests.support.tiny import build

OBJECTIVES = [{"name": "task"}, {"name": "hidden_states"}]
RUN = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 2,
}


def runner(folder, **settings):
    teacher = build("vit", seed=5, hidden_size=48, num_attention_heads=3)
    return trainer(folder, build("vit"), teacher, objectives=OBJECTIVES, **RUN | settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    run = runner(folder)
    run.train()
    return folder, weights(run.distiller)


@pytest.fixture
def run_folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


# ---- What is damaged ----


def test_every_file_is_listed_and_every_damage_to_it_is_found(run_folder):
    folder = run_folder / "checkpoint-6"
    assert verify(folder) == []
    names = {"model.safetensors", "config.json", STATE_JSON, f"{TENSORS}.safetensors", "optimizer.pt", "scheduler.pt"}
    names |= {"rng_state.pth", "training_args.bin", "trainer_state.json"}
    assert set(json.loads((folder / FILES).read_text())["files"]) == names
    for path in [folder / name for name in (*names, FILES)]:
        content = path.read_bytes()
        zeroed = bytearray(content)
        zeroed[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        for damaged in (content[: len(content) // 2], b"", bytes(zeroed), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found = verify(folder)
            assert len(found) == 1 and found[0].startswith(path.name), found
            path.write_bytes(content)
    assert verify(folder) == []


def test_one_changed_bit_is_found(run_folder):
    path = run_folder / "checkpoint-6" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert verify(path.parent) == ["model.safetensors is not as it was written: its checksum is another"]
    assert verify(path.parent, contents=False) == []
    assert latest_complete(run_folder)[0] == run_folder / "checkpoint-4"


@pytest.mark.parametrize("content", ["[]", '{"files": {}}', "nan", '{"global_step": null}', "null", '"6"', "6"])
def test_files_that_are_json_of_something_else_are_found(run_folder, content):
    for name in (FILES, "trainer_state.json"):
        shutil.copytree(run_folder / "checkpoint-6", run_folder / "checkpoint-8")
        (run_folder / "checkpoint-8" / name).write_text(content)
        assert name in "".join(verify(run_folder / "checkpoint-8"))
        shutil.rmtree(run_folder / "checkpoint-8")


@pytest.mark.parametrize(
    "wrong",
    [
        {"files": []},
        {"files": None},
        {"files": "model.safetensors"},
        {"files": {"trainer_state.json": "b"}},
        {"files": {"trainer_state.json": [1]}},
        {"files": {"trainer_state.json": [1, None]}},
        {"files": {}},
        {"written_with": []},
        {"written_with": None},
        {"run": 3},
        {"time": "now"},
    ],
    ids=str,
)
def test_a_list_of_something_else_is_damage_and_the_one_before_is_used(tmp_path, wrong):
    for step in (2, 4):
        make(tmp_path, step)
    path = tmp_path / "checkpoint-4" / FILES
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    chosen, damaged = resolve_checkpoint(True, tmp_path)
    assert chosen == tmp_path / "checkpoint-2" and list(damaged) == [path.parent]
    assert damaged[path.parent][0].startswith(FILES) and "not what was written" in damaged[path.parent][0]


def test_a_digit_that_was_changed_in_the_state_is_found(run_folder):
    path = run_folder / "checkpoint-6" / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 6,', '"global_step": 2,'))
    assert verify(path.parent) == ["trainer_state.json is not as it was written: its checksum is another"]


def test_a_save_interrupted_before_its_last_rename_is_incomplete(run_folder):
    folder = run_folder / "checkpoint-6"
    (folder / "trainer_state.json").rename(folder / UNLISTED)
    assert verify(folder) == ["trainer_state.json is missing: its save was not finished"]


def test_the_manifest_is_there_before_the_state_gets_its_name(tmp_path, monkeypatch):
    """A state without a manifest would look like a checkpoint of plain Trainer."""
    (tmp_path / "weights").write_text("1")
    (tmp_path / UNLISTED).write_text('{"global_step": 1}')
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        write_manifest(tmp_path, 1, ["weights"])
    assert read_manifest(tmp_path)["files"].keys() == {"weights", "trainer_state.json"}
    assert verify(tmp_path) == ["trainer_state.json is missing: its save was not finished"]


def test_damaged_ones_are_skipped_with_a_sentence_and_the_run_ends_bitwise(run_folder, finished, caplog):
    os.truncate(run_folder / "checkpoint-6" / "optimizer.pt", 100)
    (run_folder / "checkpoint-4" / "rng_state.pth").unlink()
    again = runner(run_folder)
    again.train(resume_from_checkpoint=True)
    message = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(message) == 2
    assert "checkpoint-6 is skipped, because optimizer.pt has 100 bytes, and was written with" in message[0]
    assert "checkpoint-4 is skipped, because rng_state.pth is missing" in message[1]
    assert all(f"{run_folder / 'checkpoint-2'} is used" in text for text in message)
    assert largest_difference(weights(again.distiller), finished[1]) == 0.0
    assert verify(run_folder / "checkpoint-4") == verify(run_folder / "checkpoint-6") == []
    assert not list(run_folder.glob("*.old"))


def test_what_was_asked_for_and_is_incomplete_is_refused(run_folder, tmp_path):
    (run_folder / "checkpoint-4" / "scheduler.pt").write_bytes(b"")
    run = runner(run_folder)
    last = run_folder / "checkpoint-6"
    with pytest.raises(
        ValueError, match=rf"checkpoint-4 is not a complete .*scheduler.pt has 0 .*latest complete one is {last}"
    ):
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    with pytest.raises(ValueError, match=rf"checkpoint-5 is not .*no such folder.*{last}"):
        run.train(resume_from_checkpoint=str(run_folder / "checkpoint-5"))
    for folder in checkpoints(run_folder):
        (folder / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"No complete checkpoint.*checkpoint-6: trainer_state.json is missing.*from the beginning"
    ):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"No complete checkpoint in .*nothing \(there is none\)"):
        runner(tmp_path / "nothing").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_plain_trainer_is_reported_as_one(run_folder):
    (run_folder / "checkpoint-6" / FILES).unlink()
    with pytest.raises(ValueError, match=f"{FILES} is missing: it was lost, or hf_kdtl's trainer did not"):
        runner(run_folder).train(resume_from_checkpoint=str(run_folder / "checkpoint-6"))


def test_other_software_and_other_processes_are_reported(run_folder, caplog):
    path = run_folder / "checkpoint-6" / FILES
    content = json.loads(path.read_text())
    content["written_with"] |= {"transformers": "5.1.0", "processes": 2}
    path.write_text(json.dumps(content))
    runner(run_folder).train(resume_from_checkpoint=True)
    assert "transformers 5.1.0 (now" in caplog.text and "processes 2 (now 1): resuming, but not" in caplog.text


# ---- Two runs in one folder ----


def test_the_run_that_wrote_last_goes_on_and_the_other_is_left(tmp_path):
    for step, run in ((2, "a"), (4, "a"), (6, "a"), (2, "b")):
        shutil.rmtree(tmp_path / f"checkpoint-{step}", ignore_errors=True)
        made = make(tmp_path, step, run=run)
    shutil.copytree(tmp_path, copied := tmp_path / "copied", ignore=lambda *_: ["copied"])
    os.utime(copied / "checkpoint-6")  # a copy's times mean nothing
    other = "it is of another run, and checkpoint-2 was written after it"
    assert resolve_checkpoint(True, tmp_path) == (made, {tmp_path / f"checkpoint-{step}": [other] for step in (6, 4)})
    assert resolve_checkpoint(True, copied)[0] == copied / "checkpoint-2"
    assert resolve_checkpoint(tmp_path / "checkpoint-6", tmp_path) == (tmp_path / "checkpoint-6", {})
    (made / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"checkpoint-6: it is of another run.*checkpoint-2: model.* path of one"):
        resolve_checkpoint(True, tmp_path)


def test_a_second_run_in_a_folder_is_reported_and_continued_as_itself(run_folder, caplog):
    def name(step):
        return read_manifest(run_folder / f"checkpoint-{step}")["run"]

    first = name(6)
    assert first and name(2) == first
    second = runner(run_folder, max_steps=2, learning_rate=1e-2)
    states = torch.get_rng_state(), random.getstate()
    second._resolve_resume(None)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]  # a name is no draw
    assert f"{run_folder} holds checkpoints of another run, up to checkpoint-6" in caplog.text
    second.args.save_total_limit = 1
    second._resolve_resume(None)
    assert "its own steps, save_total_limit=1 removes the oldest of both, and is" in caplog.text
    second.args.save_total_limit = None
    second.train()
    assert name(2) not in ("", first)
    caplog.clear()
    third = runner(run_folder, max_steps=4, learning_rate=1e-2, save_total_limit=2)
    third.train(resume_from_checkpoint=True)
    assert "checkpoint-2 is used" in caplog.text and "holds checkpoints of another run" not in caplog.text
    assert name(4) == name(2) != first and left(run_folder) == [2, 4]


# ---- Whatever the processes are asked ----


def test_what_can_be_asked_for(run_folder, tmp_path):
    run = runner(run_folder)
    last = str(run_folder / "checkpoint-6")
    for asked in (True, "True", "true", last, last + "/", Path(last)):
        assert Path(run._resolve_resume(asked)[1]) == Path(last)
    for asked in (None, False, "False", "false"):
        assert run._resolve_resume(asked)[1] is None
    for asked in ("", 6):
        with pytest.raises(ValueError, match=rf"is {asked!r}; expected True, or the path of a checkpoint"):
            run._resolve_resume(asked)
    assert run.train("true").global_step == 6
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"output_dir is .* and .*file is a file; name a folder"):
            runner(folder)


def test_processes_that_were_asked_for_different_things_are_refused(run_folder, monkeypatch):
    monkeypatch.setattr(checkpointing, "gather_object", lambda mine: [*mine, "None"])
    with pytest.raises(ValueError, match=r"is 'True' on process 0 and 'None' on 1. .*all of them the same"):
        runner(run_folder).train(resume_from_checkpoint=True)


def test_whatever_the_deciding_process_meets_reaches_the_others(run_folder, monkeypatch):
    def met(*args):
        raise KeyError("a fault of ours")

    sent = []
    monkeypatch.setattr(checkpointing, "resolve_checkpoint", met)
    monkeypatch.setattr(checkpointing, "broadcast_object_list", lambda values: (sent.extend(values), values)[1])
    with pytest.raises(RuntimeError, match="KeyError: 'a fault of ours'"):
        runner(run_folder).train(resume_from_checkpoint=True)
    assert str(pickle.loads(pickle.dumps(sent[1]))) == "KeyError: 'a fault of ours'"


def test_another_optimizer_is_refused_and_another_seed_is_reported(run_folder, caplog):
    with pytest.raises(ValueError, match=r"was trained with the optimizer AdamW and this run has SGD: set optim back"):
        runner(run_folder, optim="sgd", max_steps=7).train(resume_from_checkpoint=True)
    assert "was written with" not in caplog.text
    runner(run_folder, seed=7).train(resume_from_checkpoint=True)
    assert "was written with seed 42 (now 7): resuming, but not bit-identical" in caplog.text


def test_another_learning_rate_or_decay_is_said_not_to_be_used(run_folder, caplog):
    runner(run_folder).train(resume_from_checkpoint=True)
    assert "settings of its optimizer" not in caplog.text and "was written with" not in caplog.text
    rate = runner(run_folder).args.learning_rate
    again = runner(run_folder, learning_rate=3e-6, weight_decay=0.25, adam_beta1=0.5)
    again.train(resume_from_checkpoint=True)
    assert again.optimizer.param_groups[0]["initial_lr"] == rate
    for said in (
        f"learning_rate {rate} (asked for: 3e-06)",
        "weight_decay 0.0 (asked for: 0.25)",
        "betas (0.9, 0.999)",
    ):
        assert said in caplog.text
    assert "start a new run from its weights" in caplog.text


# ---- A save that fails ----


def failing(monkeypatch, error, which, armed):
    """Let the `which`-th file of a save be written by half and then fail; returns the files that were begun."""
    begun = []

    def patch(owner, name, place):
        function = getattr(owner, name)

        def write(*args, **kwargs):
            result = function(*args, **kwargs)
            if armed():
                begun.append(Path(args[place]).name)
                if len(begun) == which:
                    os.truncate(args[place], Path(args[place]).stat().st_size // 2)
                    raise error
            return result

        monkeypatch.setattr(owner, name, write)

    patch(torch, "save", 1)
    patch(transformers.modeling_utils, "safe_save_file", 1)
    patch(hf_kdtl.checkpoints.state, "save_file", 1)
    patch(TrainerState, "save_to_json", 1)
    patch(Path, "write_text", 0)
    return begun


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
ERRORS = [NO_SPACE, SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStreamWriter failed")]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("which", range(1, 10))
def test_a_disk_that_is_full_at_any_file_of_a_save(run_folder, monkeypatch, which):
    last, error = run_folder / "checkpoint-6", ERRORS[which % 3]
    before = contents(last)
    run = runner(run_folder, save_total_limit=1, max_steps=7)
    begun = failing(monkeypatch, error, which, lambda: run.state.global_step == 7)
    message = rf"checkpoint-7 could not be written and was removed: .*{str(error)[-12:]}.*bytes are free\). The "
    with pytest.raises(OSError, match=message + rf"latest complete one is {last}: free some space and continue"):
        run.train(resume_from_checkpoint=True)
    assert len(begun) >= which and run.args.save_total_limit == 1
    assert left(run_folder) == [2, 4, 6] and contents(last) == before and verify(last) == []


def test_the_files_of_a_save_are_the_nine_that_fail_above(tmp_path, monkeypatch):
    run = runner(tmp_path)
    begun = failing(monkeypatch, NO_SPACE, 0, lambda: run.state.global_step == 4)
    run.train()
    first = [
        f"{TENSORS}.safetensors",
        STATE_JSON,
        "model.safetensors",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
    ]
    assert begun == [*first, "rng_state.pth", "trainer_state.json.part", FILES]


@pytest.mark.parametrize("kilobytes", [50, 150])
def test_a_real_limit_on_the_size_of_a_file(tmp_path, kilobytes):
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = runner(tmp_path, callbacks=[Full()])
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*checkpoint-2: free some space"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]


def test_another_error_of_a_save_stays_what_it_is(tmp_path, monkeypatch):
    def broken(*args):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(hf_kdtl.checkpoints.state, "save_file", broken)
    with pytest.raises(TypeError, match="a fault of ours"):
        runner(tmp_path).train()
    assert checkpoints(tmp_path) == []


def test_a_push_that_fails_leaves_the_checkpoint(tmp_path, monkeypatch):
    def offline(*args):
        raise OSError("no network")

    run = runner(tmp_path)
    monkeypatch.setattr(run, "_push_from_checkpoint", offline)
    run.args.push_to_hub = True
    with pytest.raises(OSError, match=r"^no network$"):
        run.train()
    assert verify(tmp_path / "checkpoint-2") == []


def test_a_file_that_was_not_written_stops_the_save(tmp_path, monkeypatch):
    def full(*args):
        raise NO_SPACE

    for owner, name, instead, message in (
        (Trainer, "_save_rng_state", lambda *args: None, r"\['rng_state.pth'\] of .* were not written"),
        (Trainer, "_save_scaler", full, "No space left on device"),
        (TrainerState, "save_to_json", lambda *args: None, "trainer_state.json is missing"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, instead)
            with pytest.raises(OSError, match=rf"could not be written and was removed: .*{message}.*is no other"):
                runner(tmp_path).train()
        assert left(tmp_path) == []


def test_outside_of_a_checkpoint_an_error_is_not_kept_back(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise NO_SPACE

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        runner(tmp_path).save_model(str(tmp_path / "final"))


def test_the_weights_alone_are_complete_too(tmp_path):
    runner(tmp_path, save_only_model=True).train()
    assert verify(tmp_path / "checkpoint-6") == [] and not (tmp_path / "checkpoint-6" / "optimizer.pt").exists()
    (tmp_path / "checkpoint-6" / f"{TENSORS}.safetensors").unlink()
    assert verify(tmp_path / "checkpoint-6") == [f"{TENSORS}.safetensors is missing"]


# ---- Signals ----


class During(TrainerCallback):
    """Signals in the middle of the save of step 4."""

    def __init__(self, monkeypatch, *signals):
        self.signals, save = [*signals], transformers.modeling_utils.safe_save_file
        monkeypatch.setattr(
            transformers.modeling_utils, "safe_save_file", lambda *a, **k: (self.tell(), save(*a, **k))
        )
        self.step = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step

    def tell(self):
        while self.step == 4 and self.signals:
            os.kill(os.getpid(), self.signals.pop(0))


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("signals", [(TERM,), (INT,), (TERM, TERM, TERM), (INT, TERM, TERM), (TERM, INT)])
def test_signals_in_a_save_let_it_finish(tmp_path, monkeypatch, signals):
    with pytest.raises(KeyboardInterrupt, match=r"after step 4, saved in .*checkpoint-4"):
        runner(tmp_path, callbacks=[During(monkeypatch, *signals)]).train()
    assert verify(tmp_path / "checkpoint-4") == []


def test_a_second_ctrl_c_in_a_save_leaves_the_last_complete_one(tmp_path, monkeypatch, finished):
    run = runner(tmp_path, callbacks=[During(monkeypatch, INT, TERM, INT)], save_total_limit=1)
    with pytest.raises(KeyboardInterrupt, match="at once, at the second Ctrl-C"):
        run.train()
    assert latest_complete(tmp_path)[0] == tmp_path / "checkpoint-2" and run.args.save_total_limit == 1
    assert verify(tmp_path / "checkpoint-4") == ["trainer_state.json is missing: its save was not finished"]
    again = runner(tmp_path, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert largest_difference(weights(again.distiller), finished[1]) == 0.0 and left(tmp_path) == [6]


# ---- What is removed ----


def make(folder, step, content="x", run=""):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(content)
    (path / UNLISTED).write_text(json.dumps({"global_step": step}))
    write_manifest(path, 1, ["model.safetensors"], run)
    return path


def left(folder):
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


@pytest.mark.parametrize(
    ("limit", "best", "damaged", "stays"),
    [
        (None, None, [], [2, 4, 6, 8, 10]),
        (0, None, [], [2, 4, 6, 8, 10]),
        (1, None, [], [6]),
        (2, None, [], [4, 6]),
        (3, None, [], [2, 4, 6]),
        (4, None, [], [2, 4, 6, 10]),
        (1, 2, [], [2, 6]),
        (2, 2, [], [2, 6]),
        (3, 2, [], [2, 4, 6]),
        (2, None, [4], [2, 6]),
        (3, None, [2, 4], [6, 8, 10]),
        (1, 4, [4], [4, 6]),
    ],
)
def test_rotation_keeps_the_new_one_the_best_and_what_can_be_used(tmp_path, limit, best, damaged, stays):
    for step in (2, 4, 6, 8, 10):  # 8 and 10: of a run that went further, before this one was resumed from 4
        make(tmp_path, step)
        os.utime(
            tmp_path / f"checkpoint-{step}", (1e9 - step, 1e9 - step)
        )  # as after a copy: the newest is the oldest
    for step in damaged:
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").unlink()
    best = None if best is None else str(tmp_path / f"checkpoint-{best}")
    doomed = to_prune(tmp_path / "checkpoint-6", limit, best, frozenset())
    assert [step for step in (2, 4, 6, 8, 10) if tmp_path / f"checkpoint-{step}" not in doomed] == stays


def test_rotation_knows_what_resuming_found_damaged_and_leaves_other_folders(tmp_path):
    made = [make(tmp_path, step) for step in (2, 4, 6)]
    (tmp_path / "checkpoint-mine").mkdir()
    assert to_prune(made[2], 1, None, frozenset()) == made[:2]
    assert to_prune(made[2], 2, None, frozenset([made[1]])) == [made[1]]


def test_nothing_is_removed_before_the_new_one_is_on_the_disk(run_folder, monkeypatch):
    def fail(number, text):
        def fsync(descriptor):
            raise OSError(number, text)

        monkeypatch.setattr(os, "fsync", fsync)

    fail(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(
        OSError, match=r"point-7 could not be written and was removed: .*Disk quota.* is .*point-6: free"
    ):
        runner(run_folder, save_total_limit=1, max_steps=7).train(resume_from_checkpoint=True)
    assert left(run_folder) == [2, 4, 6]
    runner(run_folder, max_steps=7).train(resume_from_checkpoint=True)  # nothing to remove, nothing to wait for
    assert left(run_folder) == [2, 4, 6, 7]
    fail(errno.EINVAL, "Invalid argument")  # a file system without it
    runner(run_folder, save_total_limit=1, max_steps=8).train(resume_from_checkpoint=True)
    assert left(run_folder) == [8]


def test_an_older_one_that_cannot_be_set_aside_is_not_written_into(run_folder, monkeypatch):
    def fixed(path, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    before = contents(run_folder / "checkpoint-2")
    monkeypatch.setattr(Path, "rename", fixed)
    with pytest.raises(PermissionError):
        runner(run_folder, max_steps=2).train()
    assert contents(run_folder / "checkpoint-2") == before


def test_what_was_found_damaged_when_resuming_is_removed_first(run_folder):
    for step in (4, 6):
        path = run_folder / f"checkpoint-{step}" / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = runner(run_folder, save_total_limit=2, max_steps=5, save_steps=100)
    again.train(resume_from_checkpoint=True)
    assert left(run_folder) == [2, 5]


def test_a_checkpoint_of_the_same_step_is_replaced_and_not_mixed(tmp_path, monkeypatch, finished):
    stale = make(tmp_path, 2, "of another run")
    (stale / "stale.txt").write_text("x")
    runner(tmp_path, max_steps=2).train()
    assert verify(stale) == [] and not (stale / "stale.txt").exists() and left(tmp_path) == [2]
    assert not list(tmp_path.glob("*.old"))
    kept = (stale / "optimizer.pt").read_bytes()
    run = runner(tmp_path, max_steps=2, learning_rate=1.0)
    failing(monkeypatch, NO_SPACE, 5, lambda: True)
    with pytest.raises(
        OSError, match=r"checkpoint-2 could not be written and was removed.*latest complete one is .*point-2:"
    ):
        run.train()
    assert verify(stale) == [] and (stale / "optimizer.pt").read_bytes() == kept


def test_an_older_one_is_back_when_its_successor_was_killed(tmp_path):
    make(tmp_path, 2, "first")
    back_up(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2").mkdir()  # here it was killed
    assert resolve_checkpoint(True, tmp_path) == (tmp_path / "checkpoint-2", {})
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_text() == "first"
    back_up(tmp_path / "checkpoint-2")
    make(tmp_path, 2, "second")
    assert resolve_checkpoint(tmp_path / "checkpoint-2", tmp_path)[1] == {}  # killed before the first was removed
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_text() == "second"
    assert not list(tmp_path.glob("*.old"))


# ---- The best one ----


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_best_checkpoint_that_was_damaged(tmp_path, finished, strategy):
    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)
            if state.global_step == 6:
                os.truncate(tmp_path / "checkpoint-2" / "model.safetensors", 1000)

    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": False, "eval_dataset": Images(4)}
    run = runner(tmp_path, **settings | {"callbacks": [Worse()], "save_strategy": strategy})
    message = (
        r"best checkpoint .*checkpoint-2 cannot be loaded: model.safetensors has 1000 .*last step is in .*checkpoint-6"
    )
    with pytest.raises(ValueError, match=message):
        run.train()
    assert verify(tmp_path / "checkpoint-6") == []
    assert largest_difference(weights(run.distiller), finished[1]) == 0.0


def test_a_callback_may_change_files_that_loading_the_best_does_not_read(tmp_path, finished):
    class Slim(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = tmp_path / f"checkpoint-{state.global_step}"
            for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
                (folder / name).unlink()
            for name in ("config.json", "trainer_state.json"):
                (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"note": "x"}))

    class Worse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "eval_dataset": Images(4)}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": False, "callbacks": [Slim(), Worse()]}
    run = runner(tmp_path, **settings)
    run.train()
    saved = type(run.model).from_pretrained(finished[0] / "checkpoint-2")  # of the same run
    assert run.state.best_global_step == 2
    assert largest_difference(weights(run.model), weights(saved)) == 0.0
    projectors = load_file(finished[0] / "checkpoint-2" / f"{TENSORS}.safetensors")
    assert largest_difference(weights(run.distiller.objectives), projectors) == 0.0
    with pytest.raises(ValueError, match=r"checkpoint-6 is not a complete checkpoint: config.json has"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    os.truncate(tmp_path / "checkpoint-2" / f"{TENSORS}.safetensors", 10)
    with pytest.raises(ValueError, match=r"best checkpoint .*-2 cannot be loaded: distillation_state.safetensors has"):
        run._load_best_model()


# ---- A save_model of the user's ----


def test_a_save_model_that_writes_the_student_alone_can_be_resumed(tmp_path, finished):
    class Mine(DistillationTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            self.model.save_pretrained(output_dir or self.args.output_dir)

    def mine():
        teacher = build("vit", seed=5, hidden_size=48, num_attention_heads=3)
        return Mine(build("vit"), config(tmp_path, OBJECTIVES, **RUN), teacher=teacher, train_dataset=Images())

    mine().train()
    again = mine()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(again.distiller), finished[1]) == 0.0
    mine().save_model(str(tmp_path / "final"))
    assert not list((tmp_path / "final").glob("distillation_state*"))


# ---- Without distillation ----


def test_any_trainer_can_have_complete_checkpoints(tmp_path, caplog):
    def run():
        settings = config(tmp_path, kind=TrainingArguments, **RUN)
        return CheckpointingTrainer(build("resnet"), settings, train_dataset=Images())

    first = run()
    first.train()
    os.truncate(tmp_path / "checkpoint-6" / "model.safetensors", 10)
    second = run()
    second.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is skipped, because model.safetensors" in caplog.text
    assert largest_difference(weights(first.model), weights(second.model)) == 0.0
    second.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"best checkpoint .*checkpoint-4 cannot be loaded: config.json is missing"):
        second._load_best_model()
