"""The optimizer: Trainer's own at multipliers of 1, and the multiplier in every update otherwise."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from hf_kdtl.models import Teacher, plan
from hf_kdtl.optim import LayerRates, LayerwiseOptimizer, create_layerwise_optimizer, layer_groups
from hf_kdtl.optim.layer_rates import check_layerwise
from hf_kdtl.optim.layerwise import is_layerwise, layerwise
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.tiny import build

SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
    "one_cycle": {},
}


def arguments(folder, **settings):
    return config(folder, kind=TrainingArguments, **{"max_steps": 4, "per_device_train_batch_size": 2, **settings})


def plain(folder, model, optimizer=None, factory=None, callbacks=None, **settings):
    """A transformers.Trainer on a copy of the model; `optimizer` is (args, model) -> optimizer."""
    model = copy.deepcopy(model)
    args = arguments(folder, **settings)
    return Trainer(
        model,
        args,
        train_dataset=Images(),
        eval_dataset=Images(4),
        optimizers=(None if optimizer is None else optimizer(args, model), None),
        optimizer_cls_and_kwargs=None if factory is None else (LayerwiseOptimizer, factory(args)),
        callbacks=callbacks,
    )


# ---- Multipliers of 1 ----


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_uniform_equals_no_factory_bitwise(tmp_path, optim):
    model = build("vit")
    settings = {"optim": optim, "learning_rate": 1e-2, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 0.5, "max_steps": 2}
    reference = plain(tmp_path, model, **settings)
    uniform = {"layer_rates": {"mode": "uniform"}}
    runs = [
        reference,
        plain(tmp_path, model, lambda args, model: create_layerwise_optimizer(model, args, **uniform), **settings),
    ]
    if optim == "adamw_torch":
        runs.append(plain(tmp_path, model, factory=lambda args: {"args": args, **uniform}, **settings))
    for run in runs:
        run.train()
    assert largest_difference(weights(reference.model), weights(model)) > 0
    for run in runs[1:]:
        assert largest_difference(weights(run.model), weights(reference.model)) == 0
        assert [x["learning_rate"] for x in run.state.log_history if "learning_rate" in x] == [
            x["learning_rate"] for x in reference.state.log_history if "learning_rate" in x
        ]
        kind = type(reference.optimizer.optimizer)
        assert isinstance(run.optimizer.optimizer, kind) and is_layerwise(run.optimizer)


# ---- The effective rate, read from the update ----


def rated(optimizer):
    """Give every group a multiplier of its own; {id of a tensor: multiplier}."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr_multiplier"] = 0.3 + 0.2 * i
    return {id(p): g["lr_multiplier"] for g in optimizer.param_groups for p in g["params"]}


def scheduler(name, optimizer, steps):
    if name == "one_cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps + 1, cycle_momentum=False)
    return get_scheduler(name, optimizer, 2, steps, SCHEDULES[name])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prepared", [False, True])
def test_every_tensors_rate_is_schedule_times_base_times_multiplier(tmp_path, name, prepared):
    """SGD: (w_before - w_after) / gradient, beside an optimizer of one group that the same scheduler drives."""
    model, steps = build("vit").double(), 8
    args = arguments(tmp_path, optim="sgd", learning_rate=0.1)
    optimizer = create_layerwise_optimizer(model, args)
    multiplier = rated(optimizer)
    lone = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    schedules = [scheduler(name, o, steps) for o in (optimizer, lone)]
    stepped = Accelerator(cpu=True).prepare(optimizer) if prepared else optimizer
    seen = set()
    for step in range(steps):
        before = {id(p): p.detach().clone() for p in model.parameters()}
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 1.0 + i)
        rate = lone.param_groups[0]["lr"]
        assert all(g["lr"] == rate for g in optimizer.param_groups), "the schedule's, between the steps"
        stepped.step()
        for i, p in enumerate(model.parameters()):
            update = (before[id(p)] - p.detach()) / (1.0 + i)
            expected = torch.full_like(update, rate * multiplier[id(p)])
            torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)
        assert all(g["lr"] == rate for g in optimizer.param_groups), "put back"
        seen.add(rate)
        lone.step()
        for s in schedules:
            s.step(*([1.0 + step] if name == "reduce_lr_on_plateau" else []))
    assert len(seen) > 2


@pytest.mark.parametrize("scheduler", ["cosine", "reduce_lr_on_plateau"])
def test_the_rate_under_trainer_with_accumulation_and_clipping(tmp_path, scheduler):
    """Clipping sees every tensor at once, whatever its group: the update over the clipped gradient is the rate."""

    class Watch(TrainerCallback):
        before = None
        rates = ()

        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            lr = optimizer.param_groups[0]["lr"]
            self.before = [(p, p.detach().clone(), p.grad.clone(), lr) for p in model.parameters()]

        def on_optimizer_step(self, args, state, control, **kwargs):
            for p, before, gradient, lr in self.before:
                update = before - p.detach()
                part = gradient.abs() > 1e-4  # a key's bias has no gradient but rounding
                if not part.any():
                    continue
                rate = (update[part] / gradient[part]).median() / multiplier[id(p)]
                assert rate == pytest.approx(lr, rel=2e-2, abs=2e-3), (rate, lr)
            total = torch.stack([gradient.norm() for _, _, gradient, _ in self.before]).norm()
            assert total == pytest.approx(args.max_grad_norm, rel=1e-3)
            assert sum(bool((gradient.abs() > 1e-4).any()) for _, _, gradient, _ in self.before) > 30
            self.rates = (*self.rates, lr)

    watch = Watch()
    settings = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.1, "gradient_accumulation_steps": 2}
    if scheduler == "reduce_lr_on_plateau":
        settings |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
        settings |= {"lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 10.0}}
    trainer = plain(
        tmp_path,
        build("vit"),
        lambda args, model: create_layerwise_optimizer(model, args),
        callbacks=[watch],
        **settings,
        lr_scheduler_type=scheduler,
    )
    multiplier = rated(trainer.optimizer)
    trainer.train()
    assert len(set(watch.rates)) > 2


# ---- What must survive ----


def stepped(optimizer, parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def one(kind=torch.optim.AdamW, **options):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    groups = [
        {"params": [p], "lr_multiplier": m, "layer": i}
        for i, (p, m) in enumerate(zip(parameters, (0.5, 2.0), strict=True))
    ]
    return layerwise(kind)(groups, lr=0.1, **options), parameters


@pytest.mark.parametrize(
    "options", [{}, {"lr": torch.tensor(0.1), "fused": True}, {"fused": True}, {"foreach": True}], ids=str
)
def test_equals_explicit_rates(options):
    options = {"lr": 0.1, **options}
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    copies = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    ours = layerwise(torch.optim.AdamW)(
        [{"params": [p], "lr_multiplier": m} for p, m in zip(parameters, (0.5, 2.0), strict=True)], **options
    )
    theirs = torch.optim.AdamW(
        [{"params": [p], "lr": options["lr"] * m} for p, m in zip(copies, (0.5, 2.0), strict=True)], **options
    )
    held = ours.param_groups[0]["lr"]
    for seed in range(3):
        stepped(ours, parameters, seed)
        stepped(theirs, copies, seed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
    assert ours.param_groups[0]["lr"] is held, "the same tensor, which a scheduler may hold"


def test_an_exception_in_the_step_leaves_the_rates():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            assert [g["lr"] for g in self.param_groups] == [0.05, 0.2]
            raise RuntimeError("no memory")

    optimizer, parameters = one(Broken)
    with pytest.raises(RuntimeError, match="no memory"):
        stepped(optimizer, parameters)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle(way):
    optimizer, parameters = one()
    stepped(optimizer, parameters)
    other = way(optimizer)
    assert type(other) is type(optimizer) and is_layerwise(other)
    theirs = [p for g in other.param_groups for p in g["params"]]
    assert theirs[0] is not parameters[0]
    for seed in (1, 2):
        stepped(optimizer, parameters, seed)
        stepped(other, theirs, seed)
    assert all(torch.equal(a, b) for a, b in zip(parameters, theirs, strict=True))


def test_the_state_carries_the_multipliers(tmp_path):
    optimizer, parameters = one()
    stepped(optimizer, parameters)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert [g["lr_multiplier"] for g in state["param_groups"]] == [0.5, 2.0]
    assert [g["lr"] for g in state["param_groups"]] == [0.1, 0.1]
    other, theirs = one()
    for group in other.param_groups:
        group["lr_multiplier"] = 1.0
    with torch.no_grad():
        for a, b in zip(theirs, parameters, strict=True):
            a.copy_(b)
    other.load_state_dict(state)
    stepped(optimizer, parameters, 1)
    stepped(other, theirs, 1)
    assert all(torch.equal(a, b) for a, b in zip(parameters, theirs, strict=True))


def test_step_hooks_run_once_and_see_the_schedules_rate():
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # so that torch has wrapped the class's own step
    optimizer, parameters = one()
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(o.param_groups[0]["lr"]))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(o.param_groups[0]["lr"]))
    stepped(optimizer, parameters)
    assert seen == [0.1, 0.1]


def test_a_closure_and_a_late_group():
    optimizer, parameters = one(torch.optim.SGD)
    late = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [late]})

    def closure():
        for p in (*parameters, late):
            p.grad = torch.ones_like(p)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7.0
    assert [p[0].item() for p in (*parameters, late)] == pytest.approx([0.95, 0.8, 0.9])


# ---- In a plain Trainer ----


def test_llrd_in_a_plain_trainer(tmp_path):
    rates = {"mode": "llrd", "decay": 0.5}
    model = build("vit")
    ways = [
        plain(tmp_path, model, lambda args, model: create_layerwise_optimizer(model, args, layer_rates=rates)),
        plain(tmp_path, model, factory=lambda args: {"args": args, "layer_rates": rates}),
    ]
    for trainer in ways:
        trainer.train()
        found = {g["layer"]: g["lr_multiplier"] for g in trainer.optimizer.param_groups}
        assert found[0] == found["embeddings"] == pytest.approx(found[1] / 2) and found["norm"] == found[1]
        assert (found[0] + found[1]) / 2 == pytest.approx(1) and found["head"] == 1.0
    assert largest_difference(*(weights(t.model) for t in ways)) == 0


def test_measured_rates_in_a_plain_trainer(tmp_path):
    """The example of the README: a callback that measures on images of its own."""
    teacher, probe = Teacher(build("vit", seed=5)), Images(8, seed=3).pixels

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if rates.due(state.global_step):
                rates.measure(model, teacher, [probe], step=state.global_step)
                rates.apply(optimizer)

    model = build("vit")
    made = {}

    def optimizer(args, model):
        made["rates"] = LayerRates({"source": "attention", "every": 2, "momentum": 0.0}, model, plan(model, teacher))
        return create_layerwise_optimizer(model, args, layer_rates=made["rates"])

    trainer = plain(tmp_path, model, optimizer, callbacks=[Measure])
    rates = made["rates"]
    trainer.train()
    assert [entry["step"] for entry in rates.history] == [0, 2]
    assert rates.rates.multipliers != [1.0, 1.0]
    found = {g["layer"]: g["lr_multiplier"] for g in trainer.optimizer.param_groups}
    assert [found[0], found[1]] == rates.rates.multipliers


# ---- Refused ----


@pytest.mark.parametrize(
    "optim",
    ["lomo", "adalomo", "galore_adamw", "galore_adafactor_layerwise", "apollo_adamw", "schedule_free_sgd"],
)
def test_optimizers_that_own_their_rates_are_refused_by_name(tmp_path, optim):
    model = build("vit")
    with pytest.raises(ValueError, match=f"optim is '{optim}', which cannot have .* per layer: it.*adamw_torch"):
        create_layerwise_optimizer(model, arguments(tmp_path, optim=optim))


def test_foreign_optimizers_are_refused_with_the_call(tmp_path):
    model = build("vit")
    rates = LayerRates({"mode": "llrd"}, model)
    for foreign in (torch.optim.AdamW(model.parameters()), layerwise(torch.optim.SGD)(model.parameters(), lr=0.1)):
        for optimizer in (foreign, Accelerator(cpu=True).prepare(foreign)):
            with pytest.raises(
                ValueError, match=r"the optimizer is \w+, whose .*create_layerwise_optimizer\(student, args"
            ):
                rates.apply(optimizer)
    check_layerwise(create_layerwise_optimizer(model, arguments(tmp_path)))


def test_a_measured_mode_that_nobody_would_measure_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"'discrepancy' compares .* LayerRates\(options, student, hf_kdtl.models.plan"
    ):
        create_layerwise_optimizer(build("vit"), arguments(tmp_path), layer_rates={"mode": "discrepancy"})


def test_the_factory_knows_the_trainers_container(tmp_path):
    student, objectives = build("vit"), nn.ModuleDict({"projector": nn.Linear(2, 2)})
    container = nn.ModuleDict({"student": student, "objectives": objectives})
    for name in ("student", "objectives"):
        setattr(container, name, getattr(container, name, container[name]))
    optimizer = LayerwiseOptimizer()(container, args=arguments(tmp_path))
    assert [g["name"] for g in optimizer.param_groups] == [g["name"] for g in layer_groups(student, objectives)]


def test_layer_rates_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="layer_rates is 'llrd'; expected a mapping such as"):
        create_layerwise_optimizer(build("vit"), TrainingArguments(str(tmp_path)), layer_rates="llrd")
