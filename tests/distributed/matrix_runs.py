"""One optimizer step of each objective and gradient rule, in each way of running it, for tests/distributed/matrix.py.

The student is a ViT whose weights a LoRA adapter was merged into, so that the same student can be had with its adapter
apart; then the chain rule says what the adapter's gradients are.
"""

import copy
import tempfile
from functools import cache
from types import SimpleNamespace

import peft
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import PrinterCallback, TrainerCallback, default_data_collator

from hf_kdtl import DistillationTrainer
from hf_kdtl.data.indexed import INDEX, IndexCollator, IndexedDataset
from hf_kdtl.functional.random import Draws
from hf_kdtl.functional.surgery import inner_products
from hf_kdtl.gradient_rules import GRADIENT_RULES
from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.sample import TrainingSample
from hf_kdtl.trainer.sharding import shard
from hf_kdtl.utils.versions import CHECKPOINTING
from tests.support.helpers import Images, config
from tests.support.representations import complete
from tests.support.tiny import build

IMAGES = 8
torch._dynamo.config.recompile_limit = 256  # rows differ in what they read of the models
torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would run uncompiled without a word
torch._dynamo.config.skip_nnmodule_hook_guards = False  # what one row compiled without a hook would serve one with it


@cache
def models():
    """student (merged), adapted (the same with its adapter apart), base (with the adapter off), teacher, and the
    folder of the base, which is the student's start."""
    base, teacher = build("vit"), build("vit", seed=5, layers=3)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = peft.get_peft_model(copy.deepcopy(base), options)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    folder = [tempfile.mkdtemp()]
    base.save_pretrained(folder[0])
    if dist.is_initialized():  # only rank 0 has saved
        dist.broadcast_object_list(folder)
    student = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True).eval()
    return SimpleNamespace(student=student, adapted=adapted, base=base, teacher=teacher, folder=folder[0])


def data():
    """Images whose labels contradict the teacher, so that a gradient rule has something to do; two have none."""
    images = Images(IMAGES)
    with torch.no_grad():
        mine, its = (m(pixel_values=images.pixels).logits.softmax(1) for m in (models().student, models().teacher))
    images.labels = (mine - its).argmax(1)
    images.labels[1::4] = -100
    return images


def entries(row, teacher):
    """(objectives, gradient rule) of a row."""
    if row in OBJECTIVES:
        found = [{"name": row} | complete(row, {}, teacher)]
        if dist.is_initialized():  # the folder of rank 0: processes with other settings are refused
            dist.broadcast_object_list(found)
        return found, None
    paired = [{"name": "task"}, {"name": "attention_transfer", "weight": 100.0}, {"name": "hidden_states"}]
    against = [{"name": "task", "weight": 0.3}, {"name": "logit_kd", "weight": 3.0, "temperature": 1.0}]
    return (paired if GRADIENT_RULES[row].local else against), {"name": row}


def arguments(folder, **more):
    """One optimizer step, whose gradient nothing has changed."""
    usual = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "logging_strategy": "no"}
    usual |= {"per_device_train_batch_size": IMAGES, "train_sampling_strategy": "sequential"}
    return config(folder, [{"name": "task"}], **usual | more)


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to get."""

    def __init__(self):
        self.trainer, self.found = None, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = self.trainer.distiller.named_parameters()
        self.found = {name: p.grad.detach().clone().cpu() for name, p in named if p.grad is not None}


def step(row, args, column="one", objectives=None):
    """({name: gradient}, notes) of one step of the trainer.

    Args:
        column: "float64", "peft" and "self" have other models, "beside" the teacher that "self" has; any other changes
            `args` alone.
        objectives: these alone, without the row's rule.
    """
    graphs = counters["stats"]["unique_graphs"]
    made, images = models(), data()
    student = copy.deepcopy(made.adapted if column in ("peft", "self") else made.student)
    teacher = copy.deepcopy(made.base if column in ("self", "beside") else made.teacher)
    if column == "float64":
        student, teacher, images.pixels = student.double(), teacher.double(), images.pixels.double()
    args = copy.copy(args)  # a second TrainingArguments would part the processes
    args.objectives, args.gradient_rule = (objectives, None) if objectives else entries(row, teacher)
    kinds = [OBJECTIVES[entry["name"]] for entry in args.objectives]
    by_start = any(kind.source == "start" for kind in kinds)
    args.start = made.folder if by_start and column not in ("peft", "self") else None
    given = ("self" if column == "self" else teacher) if any(kind.needs_teacher for kind in kinds) else None
    look = Gradients()
    trainer = DistillationTrainer(student, args, teacher=given, train_dataset=images, callbacks=[look])
    trainer.remove_callback(PrinterCallback)
    look.trainer = trainer
    torch.manual_seed(3)  # of the projectors
    distiller = trainer.distiller
    if column == "float64":
        distiller.double()
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.distiller is distiller
    assert bool(getattr(trainer.model, f"is_{CHECKPOINTING}")) == (column == "checkpointing")
    # What an earlier row compiled serves this one too, where it asks the models for the same; compiling takes longest.
    compiled = counters["stats"]["unique_graphs"]
    assert compiled if column == "compile" else compiled == graphs
    return look.found, distiller.notes


def sharded(row, mesh):
    """({name: gradient}, notes) of one step of the container under FSDP2; the teacher is sharded too."""
    made, images, rank, world = models(), data(), dist.get_rank(), dist.get_world_size()
    student, teacher = copy.deepcopy(made.student).train(), copy.deepcopy(made.teacher)
    (entry, *_), rule = entries(row, teacher)
    name = entry["name"]
    objective = OBJECTIVES[name](**{k: v for k, v in entry.items() if k not in ("name", "weight")})
    own = objective.source == "start"
    source = StartingPoint.from_path(made.folder, student, None) if own else Teacher(teacher)
    if not own:
        source.match(student, None, objective.compares_classes)
    pairing = plan(student, source) if objective.needs_plan else None
    sides = {objective.source: source}, {objective.source: pairing}
    context = RunContext.of(student, {} if own else sides[0], sharded=True)
    torch.manual_seed(3)
    parts = "terms" if rule else None
    distiller = Distiller(student, {name: objective}, {name: 1.0}, *sides, context=context, split_terms=parts)
    if objective.sample:
        collate, device = IndexCollator(default_data_collator), images.pixels.device
        distiller.observe(lambda number: TrainingSample(IndexedDataset(images), collate, number, IMAGES, device))
    shard(distiller, mesh=mesh)
    each = IMAGES // world
    mine = slice(rank * each, (rank + 1) * each)
    inputs = {"pixel_values": images.pixels[mine], "labels": images.labels[mine]}
    inputs |= {INDEX: torch.arange(IMAGES)[mine]} if objective.needs_index else {}
    counts = {"images": torch.tensor(IMAGES), "labelled": (images.labels != -100).sum()}
    draws = Draws(42, 0, tuple(range(IMAGES)[mine]))
    distiller(inputs, draws, counts, world)["loss"].backward()
    found = {n: p.grad.full_tensor() for n, p in distiller.named_parameters() if p.grad is not None}
    for model in (student, *([] if own else [teacher])):
        held = model.vit.layers[0].attention.q_proj.weight
        assert held.to_local().numel() < held.numel()
    return found, distiller.notes


def of_adapter(row, folder, column):
    """The adapter's gradients as the chain rule gives them from those of the merged weights."""

    def run(objectives=None):
        return chained(step(row, arguments(folder), column, objectives)[0])

    if row in OBJECTIVES or GRADIENT_RULES[row].local:
        return run()
    task, transfer = (run([entry]) for entry in entries(row, models().teacher)[0])
    both = [[g.get(name) for name in task] for g in (task, transfer)]
    rule = GRADIENT_RULES[row]()
    return dict(zip(task, rule.combine(*both, inner_products(*both), 0), strict=True))


def chained(gradients):
    """W = W0 + s B A: the gradient of A is s B^T G, that of B is s G A^T."""
    found = {}
    for name, layer in models().adapted.named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            g = gradients[f"student.{name.removeprefix('base_model.model.')}.weight"]
            a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            found[f"student.{name}.lora_A.default.weight"] = scale * b.T @ g
            found[f"student.{name}.lora_B.default.weight"] = scale * g @ a.T
    for name, g in gradients.items():
        if name.startswith("student.classifier"):
            found[f"student.base_model.model.classifier.modules_to_save.default.{name.split('.')[-1]}"] = g
        elif name.startswith("objectives"):
            found[name] = g
    return {name: g.detach() for name, g in found.items()}
