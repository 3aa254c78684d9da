"""Whether what is to be trained can learn: one backward pass on a few images before training."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_kdtl.data.indexed import NOT_THE_STUDENTS
from hf_kdtl.functional.derivatives import math_attention
from hf_kdtl.functional.divergences import labelled
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.classifier import check_outputs
from hf_kdtl.models.teachers.chance import ChanceChecks
from hf_kdtl.trainer.checks import reentrant, reentrant_problems
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.sample import random_state, set_random_state, training_sample
from hf_kdtl.utils.versions import CHECKPOINTING

logger = logging.get_logger(__name__)
HEADS = ("classifier", "head", "fc")
Gradients = dict[str, Tensor | None]


def check_learning(trainer: Any) -> None:
    """Run one backward pass on some training images and leave no trace of it; report what gets no gradient.

    Raises:
        ValueError: when nothing of the student is trainable or gets a gradient, adapters get none under reentrant
            checkpointing or something set does not support it, the head is not the config's, or the student has a
            loss of its own that would not be used.
    """
    student, notes = trainer.model, [*_half_precision(trainer.model), *_frozen_heads(trainer.model)]
    if trainer.args.learning_rate == 0 and trainer.optimizer is None:
        notes.append("learning_rate is 0, so nothing will move.")
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            f"nothing of {type(student).__name__} is trainable: every parameter has requires_grad=False. Unfreeze "
            "what is to learn, such as student.requires_grad_(True)."
        )
    if problems := reentrant_problems(trainer.args, student):  # set on the model since the trainer was made
        raise ValueError(problems[0])
    inputs = None if trainer.sharded else _first_images(trainer)
    if inputs is not None:
        with untouched(trainer.distiller), trainer.accelerator.autocast():
            notes += _by_labels(trainer, inputs)
            notes += _by_gradient(trainer, inputs)
    for note in notes if trainer.is_world_process_zero() else ():
        logger.warning(note)


def _first_images(trainer: Any) -> dict[str, Any] | None:
    """A few training images; None where they cannot be had without disturbing training, and it is reported."""
    least = max(getattr(o, "least_images", 1) for o in trainer.distiller.objectives.values())
    try:
        sample = training_sample(trainer, max(2, least))
        return None if sample is None else next(iter(sample))
    except Exception as error:  # the first step meets it too, where it is explained
        logger.info(f"not checked before training what gets a gradient: {error}")
        return None


@contextmanager
def untouched(distiller: Distiller) -> Iterator[None]:
    """Put back what a forward and a backward pass change: random streams, buffers, gradients, modes, checks."""
    modes = {module: module.training for module in distiller.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in distiller.buffers()]
    gradients = [(p, p.grad) for p in distiller.parameters()]
    chance, rates, checked = distiller.chance, distiller.rates, vars(distiller.check_labels).copy()
    config: Any = getattr(distiller.student, "config", None)
    problem_type = getattr(config, "problem_type", None)
    distiller.chance, distiller.rates = ChanceChecks(), None
    device, outside = next(distiller.parameters()).device, random_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        set_random_state(outside)
        distiller.chance, distiller.rates = chance, rates
        vars(distiller.check_labels).update(checked)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
        if hasattr(config, "problem_type"):
            config.problem_type = problem_type


# ---- What can be read off the student ----


def _half_precision(student: nn.Module) -> list[str]:
    half = {str(p.dtype).removeprefix("torch.") for p in student.parameters()
            if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}  # fmt: skip
    return [
        f"the student's trainable weights are {name}: a step that is small beside a weight is rounded away, and it "
        "moves a fraction of what it should. Load it with dtype=torch.float32, and set bf16=True for mixed precision."
        for name in sorted(half)
    ]


def _frozen_heads(student: nn.Module) -> list[str]:
    """A classifier is made with a bias of 0, which a trained one does not keep."""
    return [
        f"{name} is frozen, and was never trained (its bias is 0 everywhere), so the student's answers stay random. "
        f"Train it: modules_to_save=[{name.rsplit('.', 1)[-1]!r}] in LoraConfig, or requires_grad_(True)."
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in HEADS and module.bias is not None
        and not any(p.requires_grad for p in module.parameters()) and not module.bias.any()
    ]  # fmt: skip


# ---- The student's own loss and head ----


def _by_labels(trainer: Any, inputs: dict[str, Any]) -> list[str]:
    """Refuse a head that is not the config's, and a loss of the student's that cross-entropy would replace."""
    student, labels = trainer.model, inputs.get("labels")
    student.eval()
    given = {name: value for name, value in inputs.items() if name not in ("labels", *NOT_THE_STUDENTS)}
    own = None
    for further in ({"labels": labels}, {}) if _indices(labels) else ({},):
        try:
            with torch.no_grad():
                own = student(**given, **further)
            break
        except Exception:  # a forward without labels, or one that the first step explains
            continue
    loss, logits = _get(own, "loss"), _get(own, "logits")
    check_outputs(student, logits)
    used = "task" in trainer.distiller.objectives and trainer.compute_loss_func is None
    if not used or loss is None or logits is None or not (_indices(labels) and labelled(labels).any()):
        return []
    expected = nn.functional.cross_entropy(logits.float(), labels)
    if expected.isfinite() and not torch.isclose(loss.float(), expected, rtol=0.02, atol=1e-3):
        raise ValueError(
            f"the loss of {type(student).__name__} is its own: {loss.item():.4g} on the first images, where the "
            f"cross-entropy of its logits is {expected.item():.4g}, and the objective 'task' is cross-entropy. Give "
            "yours as compute_loss_func=lambda outputs, labels, num_items_in_batch=None: ..., which 'task' then is."
        )
    return []


def _indices(labels: Any) -> TypeGuard[Tensor]:
    return isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()


def _get(outputs: Any, name: str) -> Tensor | None:
    found = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
    return found if isinstance(found, Tensor) else None


# ---- The gradient ----


def _by_gradient(trainer: Any, inputs: dict[str, Any]) -> list[str]:
    """What of the trainable tensors no objective reaches, by group and cause."""
    distiller = trainer.distiller
    recomputed = getattr(trainer.model, f"is_{CHECKPOINTING}", False)
    distiller.train()
    try:
        with math_attention() if recomputed and distiller.student_needs.order >= 2 else nullcontext():
            loss, found = _gradients(distiller, inputs, trainer.args.seed)
    except Exception as error:  # the first step meets it too, where it is explained
        logger.info(f"not checked before training what gets a gradient: {error}")
        return []
    groups: dict[str, list[Tensor | None]] = {}
    for name, gradient in found.items():
        groups.setdefault(_group(name), []).append(gradient)
    lost = [group for group, gradients in groups.items() if all(g is None for g in gradients)]
    if lost and (cure := reentrant(trainer.args, trainer.model)):
        raise ValueError(
            f"{_few(lost)} get no gradient: under reentrant checkpointing a block whose input needs none gives none "
            f"to its own weights; {cure}."
        )
    if len(lost) == len(groups):
        raise ValueError(
            f"no gradient reaches anything that is trainable ({_few(lost)}): no objective reads what it computes. "
            "Unfreeze what the objectives read, or add one that reads the class outputs, such as task."
        )
    if not any(g is not None and g.any() for g in found.values()):
        known = inputs.get("labels") is not None and labelled(inputs["labels"]).any()
        why = "" if known else " None of these images has a label."
        return [f"the gradient of the first images is 0 for all that is trainable, at a loss of {loss:.4g}.{why}"]
    if not lost:
        return []
    return [f"no objective reads what these compute, so they are trained by none: {_few(lost)}."]


def _gradients(distiller: Distiller, inputs: dict[str, Any], seed: int) -> tuple[float, Gradients]:
    """The loss, and {name: the gradient of a trainable tensor of the student, or None where nothing leads to it}."""
    draws = Draws(seed, 0, tuple(range(len(inputs["pixel_values"]))), include_all=True)

    def total() -> Tensor:
        # Not the container's forward, which adds 0 * logits so that DDP finds every parameter.
        terms = distiller.terms(inputs, draws)[1]
        weights = {key: 1.0 if math.isnan(weight) else weight for key, weight in distiller.weights.items()}  # auto
        return torch.stack([weights[key] * value.float().mean() for key, value in terms.items()]).sum()

    loss = total()
    trained = {name: p for name, p in distiller.student.named_parameters() if p.requires_grad}
    if not loss.requires_grad:
        return loss.item(), dict.fromkeys(trained)
    try:
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return loss.item(), dict(zip(trained, found, strict=True))
    except RuntimeError:  # reentrant checkpointing knows only backward()
        loss = total()
        for p in trained.values():
            p.grad = None
        loss.backward()
        return loss.item(), {name: p.grad for name, p in trained.items()}


def _group(name: str) -> str:
    """The block of a tensor, or the module that it lies in."""
    name = name.removeprefix("base_model.model.")
    block = re.match(r"(.*?\.\d+)\.", name)
    return block[1] if block else name.rpartition(".")[0] or name


def _few(groups: list[str]) -> str:
    return ", ".join(groups[:4]) + (f" and {len(groups) - 4} more" if len(groups) > 4 else "")
