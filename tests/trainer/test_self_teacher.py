"""teacher="self": a student with adapters learns from itself without them, as from a second copy of the model."""

import contextlib
import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification

from hf_kdtl import DistillationTrainer
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Needs, Teacher, plan
from hf_kdtl.models.adapters import load_adapters, plain_state
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers import as_source
from hf_kdtl.models.teachers.self_teacher import SelfTeacher
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.preflight import preflight
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import KD, Images, config, largest_difference, weights
from tests.support.representations import complete
from tests.support.tiny import build

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
LEARNING_FROM_A_TEACHER = sorted(name for name, kind in OBJECTIVES.items() if kind.source == "teacher")


def adapted(base="vit", moved=True, **settings):
    """A student with LoRA that has moved away from its base, and a copy of the base."""
    base = build(base, **DROPOUT) if isinstance(base, str) else base
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "lora_dropout": 0.1}
    torch.manual_seed(3)
    student = get_peft_model(copy.deepcopy(base), LoraConfig(**(options | settings)))
    for name, p in student.named_parameters():
        if moved and p.requires_grad and "lora_A" not in name:  # lora_B is zeros at first
            p.data += 0.1 * torch.randn_like(p)
    return student, base


def batch(number=4):
    data = Images(number)
    return {"pixel_values": data.pixels, "labels": data.labels}


def value_and_gradient(name, student, teacher):
    teacher = as_source(teacher)
    teacher.match(student, None, False)
    options = complete(name, {}, build("vit", **DROPOUT))
    torch.manual_seed(0)  # projectors
    made = Distiller(
        student.train(), {name: OBJECTIVES[name](**options)}, {name: 1.0}, {"teacher": teacher},
        {"teacher": plan(student, teacher)}, context=RunContext.of(student, {"teacher": teacher}),
    )  # fmt: skip
    made.observe(lambda number: [batch(16)])
    torch.manual_seed(1)  # dropout
    terms = made.terms(batch(), Draws(0, 0, (0, 1, 2, 3)))[1]
    terms[name].sum().backward()
    return terms[name].detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LEARNING_FROM_A_TEACHER)
def test_it_equals_a_second_copy(name):
    (one, base), (other, _) = adapted(), adapted()
    found, gradient = value_and_gradient(name, one, "self")
    expected, its = value_and_gradient(name, other, base)
    assert found.abs().max() > 0
    assert torch.allclose(found, expected, atol=1e-6)
    assert gradient.keys() == its.keys() and gradient
    assert max((gradient[n] - its[n]).abs().max() for n in its) < 1e-6


def run(folder, student, teacher, objectives=KD, **settings):
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | settings
    runner = DistillationTrainer(
        student, config(folder, objectives, **settings), teacher=teacher, train_dataset=Images()
    )
    runner.train()
    return runner


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objectives": [*KD, {"name": "attention_map"}, {"name": "jacobian", "fraction": 0.5}]},
        {"objectives": [*KD, {"name": "hidden_states"}], "gradient_rule": {"name": "never_hurt"}},
        {"layer_rates": {"mode": "discrepancy", "source": "attention"}},
        {"layer_rates": {"mode": "discrepancy", "source": "jacobian"}},
        pytest.param({"layer_rates": {"mode": "discrepancy", "source": "hessian"}}, marks=pytest.mark.slow),
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    ],
    ids=[
        "kd",
        "attention and jacobian",
        "never_hurt",
        "rates",
        "rates jacobian",
        "rates hessian",
        "checkpointing",
    ],
)
def test_runs_end_with_the_same_weights(tmp_path, settings):
    (one, base), (other, _) = adapted(), adapted()
    before = weights(one)
    mine, its = run(tmp_path, one, "self", **settings), run(tmp_path, other, base, **settings)
    assert largest_difference(weights(mine.model), weights(its.model)) < 1e-6
    moved = {n for n, w in weights(mine.model).items() if not torch.equal(w, before[n])}
    assert moved and all("lora_" in n or "modules_to_save" in n for n in moved), "the base stays as it is"


def test_no_second_copy_is_held(tmp_path):
    def held():
        gc.collect()
        sizes = {}
        for o in gc.get_objects():
            with contextlib.suppress(RuntimeError):  # what torch.compile left of other tests has no size in numbers
                if type(o) in (torch.Tensor, torch.nn.Parameter):
                    sizes[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
        return sum(sizes.values())

    def extra(teacher_of):
        student, base = adapted(build("vit", hidden_size=64))
        size, before = sum(p.nbytes for p in base.parameters()), held()
        runner = run(tmp_path, student, teacher_of(base), gradient_accumulation_steps=2)
        grown = held() - before
        del runner
        return grown, size

    alone, size = extra(lambda base: "self")
    two, _ = extra(lambda base: copy.deepcopy(base))
    assert two - alone == pytest.approx(size, rel=0.05)


def test_modes_and_frozen_adapters_are_put_back():
    student, _ = adapted()
    student.train()
    student.base_model.model.vit.layernorm.eval()  # as a user may leave it
    frozen = [p for n, p in student.named_parameters() if "lora_A" in n]
    for p in frozen:
        p.requires_grad_(False)
    teacher = as_source("self")
    teacher.match(student, None, False)
    modes = [m.training for m in student.modules()]
    trained = [p.requires_grad for p in student.parameters()]
    teacher.capture(batch()["pixel_values"], Needs(logits=True))
    assert [m.training for m in student.modules()] == modes and not all(modes)
    assert [p.requires_grad for p in student.parameters()] == trained and not frozen[0].requires_grad


def test_further_passes_of_the_teacher_have_the_adapters_off_too():
    student, base = adapted()
    teacher = as_source("self")
    teacher.match(student, None, False)
    x = batch()["pixel_values"]
    needs = Needs(logits=True, input_gradient=True)
    mine, its = (t.capture(x, needs).directional(torch.ones_like(x)) for t in (teacher, Teacher(copy.deepcopy(base))))
    assert torch.allclose(mine, its, atol=1e-6)
    start = StartingPoint(student).capture(x, needs).directional(torch.ones_like(x))
    assert torch.allclose(start, its, atol=1e-6)


def test_the_same_hash_with_and_without_adapters():
    student, base = adapted(modules_to_save=["classifier", "layernorm"])
    assert plain_state(student).keys() == base.state_dict().keys()
    assert fingerprint(student) == fingerprint(base)


def test_preflight_of_adapters():
    student, _ = adapted()
    report = preflight(student, "self", config("unused", [*KD, {"name": "attention_transfer"}]), Images(8).pixels)
    assert not report.problems and "no second copy" in str(report)


def test_a_student_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"peft\.get_peft_model"):
        run(tmp_path, build("vit"), "self")


def test_a_teacher_that_would_move_is_refused(tmp_path):
    student, _ = adapted(moved=False, bias="all")
    with pytest.raises(ValueError, match=r"must stay as it is.*bias"):
        run(tmp_path, student, "self")


def test_a_model_that_is_shared_says_self(tmp_path):
    student, _ = adapted()
    with pytest.raises(ValueError, match="teacher='self'"):
        run(tmp_path, student, Teacher(student.get_base_model()))


def test_it_is_no_module_of_the_container(tmp_path):
    student, _ = adapted()
    runner = run(tmp_path, student, "self")
    assert isinstance(runner.teacher, SelfTeacher) and runner.teacher.model is runner.model
    assert not any("teacher" in name for name in runner.distiller.state_dict())


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_a_resumed_run_is_as_if_never_stopped(tmp_path, adapter):
    objectives = [*KD, {"name": "hidden_states"}]
    every = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def student():
        torch.manual_seed(3)
        options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier"], "lora_dropout": 0.1}
        return get_peft_model(build("vit", **DROPOUT), LoraConfig(**options), adapter_name=adapter)

    full = run(tmp_path / "a", student(), "self", objectives, **every)
    data = {"train_dataset": Images()}
    settings = config(tmp_path / "a", objectives, per_device_train_batch_size=4, learning_rate=1e-2, **every)
    resumed = DistillationTrainer(student(), settings, teacher="self", **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert largest_difference(weights(full.distiller), weights(resumed.distiller)) == 0
    saved = {path.name for path in (tmp_path / "a" / "checkpoint-4").rglob("*.safetensors")}
    assert saved == {"adapter_model.safetensors", "distillation_state.safetensors"}, "adapters alone, no base"


def test_adapters_of_another_shape_are_refused(tmp_path):
    student, _ = adapted()
    student.save_pretrained(tmp_path)
    for settings in ({"r": 3}, {"target_modules": ["q_proj"]}, {"modules_to_save": None}):
        other, _ = adapted(moved=False, **settings)
        before = weights(other)
        with pytest.raises(ValueError, match="is not the student's"):
            load_adapters(other, tmp_path)
        assert largest_difference(weights(other), before) == 0
    torch.manual_seed(3)
    named = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    with pytest.raises(ValueError, match="no adapter 'mine'"):
        load_adapters(named, tmp_path)
    same, _ = adapted(moved=False)
    load_adapters(same, tmp_path)
    assert largest_difference(weights(same), weights(student)) == 0


def test_adapters_are_saved_merged_as_a_plain_model(tmp_path):
    student, _ = adapted()
    expected = student.eval()(pixel_values=batch()["pixel_values"]).logits
    student.merge_and_unload().save_pretrained(tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.allclose(plain(pixel_values=batch()["pixel_values"]).logits, expected, atol=1e-5)


@pytest.mark.parametrize("source", ["attention", "jacobian", "hessian"])
def test_rates_begin_at_one_where_adapters_change_nothing_yet(tmp_path, source):
    torch.manual_seed(3)
    student = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    rates = {"mode": "discrepancy", "source": source}
    first = run(tmp_path, student, "self", max_steps=1, layer_rates=rates).layer_rates.history[0]
    assert list(first["multipliers"]) == pytest.approx([1.0, 1.0], abs=1e-9)
    assert max(first["discrepancies"].values()) < 1e-9


def resnet(**settings):
    torch.manual_seed(3)
    options = {"r": 2, "target_modules": ["convolution"], "modules_to_save": ["classifier.1", "normalization"]}
    return get_peft_model(build("resnet"), LoraConfig(**(options | settings)))


def test_batch_norm_is_kept_with_the_adapters_and_off_with_them(tmp_path):
    student, base = resnet(), build("resnet")
    pixels, settings = Images(4).pixels, {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    full = run(tmp_path, student, "self", **settings)
    with torch.no_grad():
        now = full.teacher.capture(pixels, Needs(logits=True)).logits
        assert torch.equal(now, base.eval()(pixel_values=pixels).logits), "the teacher has not moved"
    resumed = DistillationTrainer(
        resnet(),
        config(tmp_path, KD, per_device_train_batch_size=4, learning_rate=1e-2, **settings),
        teacher="self",
        train_dataset=Images(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert largest_difference(weights(resumed.model), weights(full.model)) == 0


def test_what_no_adapter_file_holds_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"running_mean.*modules_to_save=\[\.\.\., 'normalization'\]"):
        run(tmp_path, resnet(modules_to_save=["classifier.1"]), "self")
    student, base = adapted(moved=False)
    student.base_model.model.vit.layernorm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layernorm\.weight.*are in no file of its adapters"):
        run(tmp_path, student, base)
    own = build("vit")
    own.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="could not be resumed"):
        run(tmp_path, own, base)


@pytest.mark.parametrize("began", ["pissa", "olora", "pissa_niter_2"])
def test_adapters_that_change_the_weights_below_them_have_no_start(began):
    student, base = adapted(moved=False, init_lora_weights=began)
    images = batch()["pixel_values"]
    with student.disable_adapter():
        assert (student.eval()(images).logits - base.eval()(images).logits).abs().max() > 1e-3
    for give in (lambda: SelfTeacher().match(student, None, False), lambda: StartingPoint(student)):
        with pytest.raises(ValueError, match=f"init_lora_weights='{began}' of the adapter 'default' changed"):
            give()


@pytest.mark.parametrize("began", [True, False, "gaussian", "orthogonal"])
def test_other_adapters_leave_the_model_below_them_as_it_was(began):
    student, base = adapted(moved=False, init_lora_weights=began)
    teacher = SelfTeacher()
    teacher.match(student, None, False)
    found = teacher.capture(batch()["pixel_values"], Needs(logits=True)).logits
    assert torch.equal(found, base.eval()(batch()["pixel_values"]).logits)
