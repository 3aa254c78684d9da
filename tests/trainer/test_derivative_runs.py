"""Derivative objectives in training: checkpointing, adapters, evaluation, and what is refused in which words."""

import copy

import peft
import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs

from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.preflight import preflight
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import Images, and_slow, config, largest_difference, pair, trainer, weights
from tests.support.tiny import build

DERIVED = [name for name in OBJECTIVES if hasattr(OBJECTIVES[name], "choices")]
DRAWS = Draws(0, 0, (0, 1, 2, 3))


def entries(*named):
    return [{"name": "task", "weight": 0.3}, *({"weight": 0.5, **entry} for entry in named)]


def inputs(seed=3):
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, -100, 2])}


def terms(student, teacher, name, context=None, **options):
    source = Teacher(teacher)
    source.match(student, None, True)
    objective = OBJECTIVES[name](**options)
    pairing = plan(student, source) if objective.needs_plan else None
    made = Distiller(
        student, {name: objective}, {name: 1.0}, {"teacher": source}, {"teacher": pairing}, context=context
    )
    return made.terms(inputs(), DRAWS)[1][name]


def gradients(student, value):
    scale = torch.arange(1, 1 + len(value))
    found = torch.autograd.grad(
        (value * scale).sum(), [p for p in student.parameters() if p.requires_grad], allow_unused=True
    )
    return [torch.zeros(()) if g is None else g for g in found]


@pytest.mark.parametrize("entry", [{"name": "jacobian"}, {"name": "attention_jacobian"},
                                   {"name": "jacobian", "estimator": "split", "central": True},
                                   {"name": "jacobian", "fraction": 0.5}], ids=str)  # fmt: skip
def test_checkpointing_changes_nothing(tmp_path, entry):
    student, teacher = pair()
    ran = {}
    for checkpointing in (False, True):
        ran[checkpointing] = trainer(
            tmp_path / str(checkpointing), student, teacher, Images(8), entries(entry), max_steps=2, optim="sgd",
            learning_rate=0.05, per_device_train_batch_size=4, **{CHECKPOINTING: checkpointing},
        )  # fmt: skip
        ran[checkpointing].train()
    assert largest_difference(weights(ran[False].model), weights(student)) > 1e-3
    assert largest_difference(weights(ran[False].model), weights(ran[True].model)) < 1e-6


@pytest.mark.parametrize("arch", and_slow(["vit", "convnext", "resnet"], ["deit", "dinov2"]))
@pytest.mark.parametrize("name", ["jacobian", "attention_jacobian"])
def test_split_equals_double_backward_as_student_and_as_teacher(arch, name):
    other = "vit" if arch != "vit" else "swin"
    for student_of, teacher_of in ((arch, other), (other, arch)):
        # In train mode: drop path, and BatchNorm by its running statistics.
        found = []
        for estimator in ("vjp", "split"):
            student, teacher = build(student_of).double().train(), build(teacher_of, seed=5).double()
            torch.manual_seed(2)
            double = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}
            source = Teacher(teacher)
            source.match(student, None, True)
            made = Distiller(student, {"a": OBJECTIVES[name](estimator=estimator)}, {"a": 1.0}, {"teacher": source},
                             {"teacher": plan(student, source)})  # fmt: skip
            value = made.terms(double, DRAWS)[1]["a"]
            found.append((value, gradients(student, value)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-10)
        assert max(g.abs().max() for g in found[0][1]) > 1e-4
        for a, b in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(a + 0 * b, b + 0 * a, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in DERIVED if n != "noisy_kd"])
def test_under_lora_the_adapters_learn_and_nothing_else(name):
    base = build("vit")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    student = peft.get_peft_model(copy.deepcopy(base), lora)
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1)
    value = terms(student, build("vit", seed=5), name)
    value.sum().backward()
    learning = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    # The last block of a ViT reads its queries for the class token, which the patches' energy does not see; no matter.
    assert learning and all("lora_" in n or "modules_to_save" in n for n in learning)
    assert sum("lora_A" in n for n in learning) >= 2


def test_evaluation_reports_derivatives_though_it_runs_without_gradients(tmp_path):
    student, teacher = pair()
    runner = trainer(tmp_path, student, teacher, Images(8), entries({"name": "jacobian"}, {"name": "hessian"}),
                     eval_dataset=Images(8), eval_objectives=True, per_device_eval_batch_size=4)  # fmt: skip
    found = runner.evaluate()
    assert 0 < found["eval_jacobian"] < 4 and 0 < found["eval_hessian"] < 4
    with torch.no_grad():
        assert runner.objective_terms(inputs())["jacobian"].shape == (4,)
    assert all(p.grad is None for p in runner.model.parameters())


def test_in_evaluation_every_image_takes_part(tmp_path):
    student, teacher = pair()
    entry = {"name": "jacobian", "distance": "fisher", "output": "all", "step": 0.01}
    found = []
    for fraction, batch in ((1.0, 8), (0.1, 8), (0.1, 2)):
        runner = trainer(tmp_path, student, teacher, Images(8), entries({**entry, "fraction": fraction}),
                         eval_dataset=Images(8), eval_objectives=True, per_device_eval_batch_size=batch)  # fmt: skip
        found.append(runner.evaluate()["eval_jacobian"])
    assert found[0] > 0 and found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_preflight_looks_at_images_that_take_part(tmp_path):
    entry = entries({"name": "jacobian", "fraction": 0.25})
    found = preflight(*pair(), config(tmp_path, entry), torch.randn(4, 3, 32, 32))
    (cost,) = found.costs
    assert cost.memory > 1.2
    one = preflight(build("vit", num_labels=1), build("vit", num_labels=1, seed=5), config(tmp_path, entry))
    assert any("one class (K = 1)" in problem for problem in one.problems)


def test_preflight_finds_an_objective_that_moves_nothing(tmp_path):
    student, teacher = pair()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("classifier" in name)
    found = preflight(student, teacher, config(tmp_path, entries({"name": "attention_jacobian"})))
    assert any("'attention_jacobian' moves none of the student's trainable" in p for p in found.problems)


def test_the_inner_gradients_leave_param_grad_alone():
    student, teacher = pair()
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    terms(student, teacher, "jacobian")
    terms(student, teacher, "hessian")
    assert all((p.grad == 7.0).all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


AUTOCAST = [
    ("jacobian", {}),
    ("jacobian", {"estimator": "split"}),
    ("jacobian", {"estimator": "split", "central": True}),
    ("jacobian", {"distance": "fisher", "output": "all"}),
    ("jacobian", {"distance": "fisher", "output": "all", "central": True}),
    ("hessian", {}),
    ("hessian", {"what": "curvature", "estimator": "finite_difference"}),
    ("noisy_kd", {}),
]


@pytest.mark.parametrize("arch", ["vit", "convnext", "resnet"])
@pytest.mark.parametrize(("name", "options"), AUTOCAST)
def test_bf16_autocast_stays_near_float32(arch, name, options):
    """Differences and shifted passes run in float32; the others carry bf16's own error, of a few percent."""
    shifted = options.get("central") or options.get("output") or options.get("what")
    if arch == "resnet" and (shifted or name == "hessian"):
        pytest.skip("refused: a net with kinks")
    student, teacher = build(arch), build("vit", seed=5)
    exact = terms(student, teacher, name, **options)
    with torch.autocast("cpu", torch.bfloat16):
        value = terms(student, teacher, name, **options)
        value.sum().backward()
    off = (value - exact).abs().max() / exact.abs().max()
    assert off < (1e-3 if shifted and options.get("estimator") != "split" else 0.1), off
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


# ---- What is refused ----


def refused(tmp_path, entry, student=None, teacher=None, data=None, **settings):
    own, its = pair()
    its = its if OBJECTIVES[entry["name"]].needs_teacher else None
    images = data or Images(8)
    made = trainer(tmp_path, student or own, teacher or its, images, entries(entry), max_steps=1, **settings)
    made.train()


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ddp_static_graph": True}, "static_graph=True no longer synchronizes.*Leave ddp_static_graph"),
        (
            {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
            'wrong gradients under reentrant checkpointing.*use_reentrant": false',
        ),
    ],
)
def test_settings_that_would_be_silently_wrong(tmp_path, name, settings, says):
    with pytest.raises(ValueError, match=says):
        refused(tmp_path, {"name": name}, **settings)


def test_static_graph_of_accelerate_is_found_too(tmp_path):
    runner = trainer(tmp_path, *pair(), Images(8), entries({"name": "jacobian"}))
    runner.accelerator.ddp_handler = DistributedDataParallelKwargs(static_graph=True)
    from hf_kdtl.trainer.checks import check_setting

    with pytest.raises(ValueError, match="static_graph=True no longer synchronizes"):
        check_setting(runner)


SETTINGS = [
    ("jacobian", {"estimator": "vjp"}, {"sharded": True}, "FSDP2 a double backward gives zero.*estimator='split'"),
    ("jacobian", {"estimator": "vjp"}, {"compiled": True}, "torch.compile has no double backward.*estimator='split'"),
    ("hessian", {}, {"sharded": True}, "FSDP2.*what='curvature', estimator='finite_difference'"),
    ("jacobian", {"estimator": "split"}, {"compiled": True}, "forward mode does not run under torch.compile.*central"),
    ("jacobian", {"estimator": "split"}, {"checkpointing": True}, "under gradient checkpointing; use estimator='vjp'"),
    (
        "jacobian",
        {"output": "all", "distance": "fisher"},
        {"low_precision": ("the teacher has half-precision weights",)},
        "the teacher has half-precision.*float32.*use estimator='vjp'",
    ),
    (
        "jacobian",
        {"output": "all", "distance": "fisher"},
        {"nonsmooth_layers": ("the student has ReLU",)},
        "the student has ReLU",
    ),
    ("hessian", {}, {"checkpointing": True}, "not recomputed under gradient checkpointing.*curvature"),
    ("jacobian", {"output": "all", "distance": "fisher"}, {"tf32": True}, "TF32 is on.*tf32=False.*'vjp'"),
    ("jacobian", {}, {"coupled": "InstanceNorm2d"}, "the student's InstanceNorm2d takes statistics"),
    ("jacobian", {}, {"batch_norm": True, "checkpointing": True}, "BatchNorm would be recomputed"),
    ("jacobian", {"output": "all", "distance": "fisher", "estimator": "vjp"}, {"compiled": True}, "finite_difference"),
    (
        "jacobian",
        {"estimator": "vjp"},
        {"compiled": True, "nonsmooth_layers": ("the student has ReLU",)},
        "do without torch.comp",
    ),
    ("hessian", {"what": "curvature"}, {"compiled": True}, "use estimator='finite_difference'"),
    ("jacobian", {"fraction": 0.5}, {"sharded": True}, "same forwards.*fraction=1"),
    ("jacobian", {}, {"trainable": False}, "no trainable parameter, so no gradient path"),
    ("hessian", {}, {"nonsmooth_layers": ("the student has ReLU",)}, "piecewise linear.*Use jacobian"),
]


@pytest.mark.parametrize(("name", "options", "setting", "says"), SETTINGS)
def test_an_estimator_that_is_wrong_in_a_setting_names_the_right_one(name, options, setting, says):
    student, teacher = pair()
    with pytest.raises(ValueError, match=f"objective '{name}'.*{says}"):
        terms(student, teacher, name, RunContext(**setting), **options)


AUTO = [
    ({}, "vjp"),
    ({"checkpointing": True}, "vjp"),
    ({"sharded": True}, "split"),
    ({"compiled": True}, "split, central, step"),
    ({"sharded": True, "checkpointing": True}, "split, central, step"),
]


@pytest.mark.parametrize(("setting", "expected"), AUTO)
def test_auto_takes_what_is_exact_and_says_so(setting, expected):
    objective = OBJECTIVES["jacobian"]()
    (note,) = objective.prepare(RunContext(**setting))
    assert note.startswith(f"estimator {expected}")
    assert ("Not vjp" in note) == (expected != "vjp")


def test_auto_for_all_classes_is_finite_differences():
    (note,) = OBJECTIVES["jacobian"](output="all", distance="fisher").prepare(RunContext())
    assert note.startswith("estimator finite_difference, step")


def test_preflight_says_which_estimator_and_why(tmp_path):
    student, teacher = build("resnet"), build("vit", seed=5)
    settings = config(tmp_path, entries({"name": "jacobian"}))
    found = str(preflight(student, teacher, settings, torch.randn(4, 3, 32, 32)))
    assert "jacobian: estimator vjp: exact" in found and "BatchNorm: derivative passes use the running" in found
    cost = next(line for line in found.splitlines() if line.startswith("  task + jacobian"))
    assert float(cost.split("time")[1].split()[0]) > 1.0


def test_preflight_finds_a_static_graph(tmp_path):
    settings = config(tmp_path, entries({"name": "jacobian"}), ddp_static_graph=True)
    found = preflight(*pair(), settings, torch.randn(2, 3, 32, 32))
    assert any("Leave ddp_static_graph" in problem for problem in found.problems)


def test_a_frozen_student_has_no_gradient_path(tmp_path):
    student, _ = pair()
    with pytest.raises(ValueError, match=r"nothing of ViTForImageClassification is trainable"):
        refused(tmp_path, {"name": "jacobian"}, student=student.requires_grad_(False))


def test_integer_pixels_have_no_derivative():
    student, teacher = pair()
    made = Distiller(student, {"j": OBJECTIVES["jacobian"]()}, {"j": 1.0}, {"teacher": Teacher(teacher)})
    with pytest.raises(ValueError, match=r"torch.uint8; derivatives need floating-point pixels. Normalise them"):
        made.terms({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, Draws(0, 0, (0, 1)))


@pytest.mark.parametrize("name", ["jacobian", "jacobian_norm", "hessian", "noisy_kd"])
def test_one_class_is_not_a_class_output(name):
    student, teacher = (build("vit", num_labels=1, seed=s) for s in (0, 5))
    made = Distiller(student, {name: OBJECTIVES[name]()}, {name: 1.0}, {"teacher": Teacher(teacher)})
    with pytest.raises(ValueError, match=f"objective '{name}': the models have one class"):
        made.terms({"pixel_values": inputs()["pixel_values"], "labels": torch.zeros(4, dtype=torch.long)}, DRAWS)


def test_a_teacher_without_gradients_to_its_pixels_is_refused():
    student, teacher = pair()
    plain = teacher.forward
    teacher.forward = lambda **kwargs: torch.no_grad()(plain)(**kwargs)
    with pytest.raises(ValueError, match=r"no gradient path from the output to the pixels.*cached.*quantised"):
        terms(student, teacher, "jacobian")


def test_a_bf16_teacher_can_be_matched_by_vjp_and_not_by_differences():
    student, teacher = pair()
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    ours, exact = terms(student, half, "jacobian"), terms(student, teacher, "jacobian")
    torch.testing.assert_close(ours, exact, atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="the teacher has half-precision weights"):
        terms(student, half, "jacobian", output="all", distance="fisher")


def test_a_broken_derivative_is_named(tmp_path):
    student, teacher = pair()

    def break_slope(module, args, output):
        # The value is left as it is; its slope is 0 * inf.
        output.logits = output.logits + 0 * torch.sqrt(0 * args_seen[0]).sum()
        return output

    args_seen = []
    student.register_forward_pre_hook(lambda m, a, k: args_seen.insert(0, k["pixel_values"]), with_kwargs=True)
    student.register_forward_hook(break_slope)
    with pytest.raises(FloatingPointError, match="jacobian is not finite"):
        trainer(tmp_path, student, teacher, Images(8), entries({"name": "jacobian"}), max_steps=1).train()


def test_all_zero_gradients_are_finite():
    student, teacher = pair()
    with torch.no_grad():
        student.classifier.weight.zero_()
    value = terms(student, teacher, "jacobian")
    torch.testing.assert_close(value, torch.ones(4))  # the student's direction is 0, the teacher's a unit vector
    assert all(torch.isfinite(g).all() for g in gradients(student, value))


BAD = [
    ("jacobian", {"fraction": 0}, r"fraction is 0; expected a number in \(0, 1\]"),
    ("jacobian", {"fraction": 1.5}, "fraction is 1.5"),
    ("jacobian", {"probes": 0}, "probes is 0; expected a whole number of at least 1"),
    ("jacobian", {"probes": 2}, "probes is 2; expected 1: teacher_top1 by auto draws nothing"),
    ("jacobian", {"distance": "normalized", "output": "all"}, "What goes with what"),
    ("jacobian", {"distance": "fisher"}, "fisher .* all"),
    ("jacobian", {"distance": "normalized", "estimator": "finite_difference"}, "expected auto or vjp or split.*What"),
    ("jacobian", {"distance": "squared", "output": "projection", "estimator": "finite_difference"}, "What goes"),
    ("jacobian", {"distance": "fisher", "output": "all", "estimator": "split"}, "finite_difference or vjp"),
    ("jacobian", {"of": "probability"}, "logit or logprob or centred"),
    ("jacobian", {"distance": "fisher", "output": "all", "of": "logit"}, "of is 'logit'; expected nothing"),
    ("jacobian", {"step": 0.1}, "step is 0.1; expected nothing: set estimator"),
    ("jacobian", {"central": True}, "central is True; expected false: set estimator"),
    ("jacobian", {"estimator": "split", "central": True, "step": -1}, "step is -1; expected a number greater than 0"),
    ("jacobian_norm", {"of": "softmax"}, "logit or logprob or centred"),
    ("attention_jacobian", {"pool": 0}, "pool is 0"),
    ("attention_jacobian", {"estimator": "finite_difference"}, "expected auto or vjp or split"),
    ("hessian", {"what": "trace"}, "expected 'hvp' or 'curvature'"),
    ("hessian", {"what": "curvature", "distance": "normalized"}, "expected squared with what='curvature'"),
    ("hessian", {"estimator": "finite_difference"}, "expected auto or hvp with what='hvp'"),
    ("hessian", {"output": "all"}, "'teacher_top1' or 'label'"),
    ("noisy_kd", {"noise": 0}, "noise is 0; expected a number greater than 0"),
]


@pytest.mark.parametrize(("name", "options", "says"), BAD)
def test_options_that_do_not_go_together(name, options, says):
    with pytest.raises(ValueError, match=f"(?s)objective '{name}': .*{says}"):
        OBJECTIVES[name](**options)


def test_labels_as_distributions_are_no_class_index(tmp_path):
    with pytest.raises(ValueError, match=r"labels are distributions of shape .*mixup"):
        refused(tmp_path, {"name": "jacobian", "output": "label"}, data=Images(8, "soft"))
