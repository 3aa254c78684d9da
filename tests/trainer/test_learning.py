"""Runs that could not learn are refused or reported before the first step, and the look at it leaves no trace."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import peft
import pytest
import torch

from hf_kdtl import DistillationTrainer
from hf_kdtl.trainer import learning
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import KD, Images, config, largest_difference, trainer, weights
from tests.support.state import broken, mixed, state_of
from tests.support.tiny import build

RUN = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}


def lora(**options):
    return peft.get_peft_model(build("vit"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def one_class():
    return build("vit", num_labels=1), KD, {}


def frozen():
    return build("vit").requires_grad_(False), KD, {}


def frozen_backbone():
    student = build("vit")
    student.vit.requires_grad_(False)
    return student, [{"name": "attention_map"}], {}


def reentrant():
    checkpointing = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    return lora(modules_to_save=["classifier"]), [{"name": "task"}], checkpointing


def another_head():
    student = build("vit")
    student.classifier = torch.nn.Linear(32, 5)
    return student, [{"name": "task"}], {}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (one_class, "the student has one class, of which every answer is right, so task, logit_kd would be 0"),
        (frozen, "nothing of ViTForImageClassification is trainable"),
        (frozen_backbone, r"no gradient reaches anything that is trainable \(classifier\)"),
        (reentrant, r"vit.layers.0, vit.layers.1 get no gradient: under reentrant checkpointing"),
        (another_head, r"head of ViTForImageClassification gives 5 outputs and its config has 3 classes"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_learn_is_refused(tmp_path, case, says):
    student, objectives, settings = case()
    needs_teacher = any(entry["name"] != "task" for entry in objectives)
    teacher = build("vit", seed=5, num_labels=getattr(student.config, "num_labels", 3)) if needs_teacher else None
    data = Images()
    data.labels = data.labels * 0
    with pytest.raises(ValueError, match=says):
        DistillationTrainer(
            student, config(tmp_path, objectives, **RUN | settings), teacher=teacher, train_dataset=data
        ).train()


def test_the_cure_of_reentrant_checkpointing_moves_every_adapter(tmp_path):
    student, objectives, settings = reentrant()
    settings[f"{CHECKPOINTING}_kwargs"] = {"use_reentrant": False}
    trained = DistillationTrainer(student, config(tmp_path, objectives, **RUN | settings), train_dataset=Images())
    before = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    trained.train()
    assert all((p != before[n]).any() for n, p in student.named_parameters() if n in before)


@pytest.mark.parametrize(
    ("objectives", "says"),
    [
        ([{"name": "attention_transfer"}], "trained by none: vit.layernorm, classifier"),
        (KD, None),
    ],
    ids=["head", "none"],
)
def test_groups_without_a_gradient_are_named(tmp_path, caplog, objectives, says):
    made = trainer(tmp_path, build("vit"), build("vit", seed=5), objectives=objectives, **RUN)
    made.train()
    found = [record.message for record in caplog.records if record.name == learning.__name__]
    assert (says in found[0] and len(found) == 1) if says else not found


def test_a_new_head_that_lora_freezes_is_named(tmp_path, caplog):
    student = lora()
    torch.nn.init.zeros_(student.base_model.model.classifier.bias)
    DistillationTrainer(student, config(tmp_path, [{"name": "task"}], **RUN), train_dataset=Images()).train()
    assert "classifier is frozen, and was never trained" in caplog.text
    assert "modules_to_save=['classifier']" in caplog.text


def test_a_head_that_was_trained_may_be_frozen(tmp_path, caplog):
    DistillationTrainer(lora(), config(tmp_path, [{"name": "task"}], **RUN), train_dataset=Images()).train()
    assert "never trained" not in caplog.text


def test_half_precision_without_master_weights_is_named(tmp_path, caplog):
    trainer(tmp_path, build("vit").to(torch.bfloat16), **RUN).train()
    assert "trainable weights are bfloat16" in caplog.text and "dtype=torch.float32" in caplog.text


def test_runs_that_cannot_move_are_named(tmp_path, caplog):
    trainer(tmp_path, build("vit"), **RUN | {"learning_rate": 0.0}).train()
    assert "learning_rate is 0, so nothing will move" in caplog.text
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": -100}] * 8
    trainer(tmp_path, build("vit"), data=rows, **RUN).train()
    assert "is 0 for all that is trainable, at a loss of 0. None of these images has a label." in caplog.text


class Randomly(Images):
    """Augmented by torch's own random stream."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {**item, "pixel_values": item["pixel_values"] + 0.1 * torch.randn(3, 32, 32)}


@pytest.mark.parametrize(
    ("family", "objectives", "settings"),
    [
        ("vit", KD, {}),
        ("resnet", KD, {}),
        ("vit", [{"name": "task"}, {"name": "hidden_states"}], {"gradient_rule": {"name": "pcgrad"}}),
        ("vit", KD, {"layer_rates": {"mode": "discrepancy", "source": "attention", "every": 1}}),
        ("vit", [{"name": "task"}, {"name": "jacobian"}], {CHECKPOINTING: True}),
    ],
    ids=["dropout", "batch norm", "rule", "rates", "derivatives"],
)
def test_the_look_leaves_no_trace(tmp_path, monkeypatch, family, objectives, settings):
    student = build(family, **({"hidden_dropout_prob": 0.1} if family == "vit" else {}))
    found = []
    for looked in (True, False):
        if not looked:
            monkeypatch.setattr("hf_kdtl.trainer.trainer.check_learning", lambda trainer: None)
        made = trainer(tmp_path, student, build(family, seed=5), Randomly(), objectives, **RUN | settings)
        torch.manual_seed(7)
        made.train()
        found.append((weights(made.distiller), [line.get("loss") for line in made.state.log_history]))
    assert largest_difference(found[0][0], found[1][0]) == 0.0 and found[0][1] == found[1][1]


def test_gradients_and_the_problem_type_are_put_back(tmp_path):
    made = trainer(tmp_path, build("vit"), **RUN)
    made.model.classifier.bias.grad = torch.ones(3)
    learning.check_learning(made)
    assert made.model.classifier.bias.grad.tolist() == [1, 1, 1]
    assert made.model.vit.embeddings.cls_token.grad is None and made.model.config.problem_type is None
    assert made.distiller.rates is None and not made.model.training


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_look_changes_is_put_back(tmp_path, fails):
    """Gradients, modes, running statistics, and every random stream: whatever is done inside."""
    container = trainer(tmp_path, mixed(build("resnet")), build("resnet", seed=5), **RUN).distiller
    before = state_of(container), random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(KeyError) if fails else nullcontext(), learning.untouched(container):
        container.train().student(torch.randn(4, 3, 32, 32)).logits.sum().backward()
        random.random(), np.random.random()
        if fails:
            raise KeyError
    assert (state_of(container), random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("objective", ["logit_kd", "jacobian", "attention_map", "hidden_states"])
def test_a_look_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, objective):
    """The first step meets the error too, where it is explained."""
    made = trainer(tmp_path, mixed(build("vit")), build("vit", seed=5), objectives=[{"name": objective}], **RUN)
    container = made.distiller
    broken(made.model, monkeypatch)
    before = state_of(container, made.teacher.model)
    learning.check_learning(made)
    assert state_of(container, made.teacher.model) == before


def test_an_optimizer_of_other_tensors_is_refused_and_one_of_a_part_is_noted(tmp_path, caplog):
    def run(student, optimizer):
        made = config(tmp_path, [{"name": "task"}], max_steps=1)
        DistillationTrainer(student, made, train_dataset=Images(), optimizers=(optimizer, None)).train()

    student = build("vit")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of the student's \d+ trainable tensors .*made of another model"):
        run(copy.deepcopy(student), optimizer)
    run(student, torch.optim.SGD(student.vit.parameters(), lr=0.1))
    assert "does not hold 2 of the student's" in caplog.text and "classifier.weight" in caplog.text
    caplog.clear()
    student.classifier.requires_grad_(False)
    run(student, torch.optim.SGD(student.vit.parameters(), lr=0.1))
    assert "does not hold" not in caplog.text
