"""From a student, a teacher and the settings to the container that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from hf_kdtl.config import DistillationConfig
from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.pairing import PairingPlan, plan
from hf_kdtl.models.quantization import plain_layers, round_layers
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.backbone import check_trainable
from hf_kdtl.models.teachers.chance import ChanceChecks
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives import Objective
from hf_kdtl.optim import LayerRates, RateOptions
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.headless import freeze_unread
from hf_kdtl.trainer.sample import Images
from hf_kdtl.utils.versions import CHECKPOINTING

logger = logging.get_logger(__name__)


def build_distiller(
    student: nn.Module,
    teacher: SignalSource | None,
    config: DistillationConfig,
    *,
    processing_class: Any = None,
    images: Images = lambda number: None,
    start: StartingPoint | None = None,
    kept: Mapping[str, Objective] | None = None,
    task_loss: Callable[..., Tensor] | None = None,
    sharded: bool = False,
    device: torch.device | None = None,
    place_student: bool = True,
) -> Distiller:
    """The student and the objectives of the settings, matched to the teacher, with their sample read.

    Args:
        processing_class: the student's image processor.
        images: the training data. Without any, blocks are paired on blank images.
        start: what the student started from; by default as the config says.
        kept: objectives of an earlier container of the same models, by key, whose parameters and buffers are used on.
        task_loss: in place of `task`'s value.
        sharded: whether FSDP2 will shard the container.
        device: where everything goes; None leaves the models where they are.
        place_student: False leaves the student where it is.

    Raises:
        ValueError: where the models, the data and the objectives do not fit.
    """
    objectives, options = config.build_objectives(), config.rate_options
    check_trainable(student)
    sources: dict[str, SignalSource] = {}
    compared: set[str] = set()
    if teacher is not None:
        compared = match_teacher(teacher, student, processing_class, objectives.values())
        sources = dict(teacher.members())
    if any(objective.source == "start" for objective in objectives.values()):
        placed = device if place_student else None
        sources["start"] = start or _starting_point(student, config, processing_class, placed)
    if device is not None:
        sources = {name: source.to(device) for name, source in sources.items()}
    unread = _freeze_unread(student, images)
    plans = _plans(student, sources, objectives, options if options and options.measured else None, images)
    compiled, checkpointing = bool(config.torch_compile), bool(getattr(config, CHECKPOINTING))
    teachers = {name: source for name, source in sources.items() if name != "start"}
    plain_layers(student)  # of an earlier trainer
    if config.quantize is not None:
        round_layers(student)
    distiller = Distiller(
        student, objectives, config.weights(), sources, plans, task_loss,
        RunContext.of(student, teachers, compiled, checkpointing, sharded),
        None if options is None else LayerRates(options, student, plans.get(options.teacher_name), seed=config.seed),
        _split_terms(config),
    )  # fmt: skip
    distiller.view_seed = config.view_seed
    if not is_multi_label(student):
        distiller.chance = ChanceChecks(name for name in teachers if name in compared)
    distiller.notes += unread
    for note in distiller.notes:
        logger.info(note)
    if device is not None and place_student:
        distiller.to(device)
    known = {key for key, earlier in (kept or {}).items() if _taken_over(distiller.objective(key), earlier)}
    distiller.observe(images, known)
    return distiller


def _taken_over(objective: Objective, earlier: Objective) -> bool:
    """Give an objective the parameters and buffers of another, the tensors themselves, which an optimizer may hold;
    whether they fit."""
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (objective, earlier)]
    if shapes[0] != shapes[1]:
        return False
    for module, its in zip(objective.modules(), earlier.modules(), strict=True):
        module._parameters.update(its._parameters)
        module._buffers.update(its._buffers)
    return True


def match_teacher(
    teacher: SignalSource, student: nn.Module, processing_class: Any, objectives: Iterable[Objective], data: Any = None
) -> set[str]:
    """`match`, of several teachers with the classes of those alone whose class outputs an objective compares.

    Args:
        data: the training data, where it is known: of stores, it must be theirs.

    Returns:
        their names.
    """
    compared = {objective.source for objective in objectives if objective.compares_classes} & teacher.members().keys()
    teacher.match(student, processing_class, bool(compared) if teacher.members().keys() == {"teacher"} else compared)
    for one in teacher.members().values() if data is not None else ():
        one.check_data(data)
    return compared


def _plans(
    student: nn.Module,
    sources: Mapping[str, SignalSource],
    objectives: Mapping[str, Objective],
    rates: RateOptions | None,
    images: Images,
) -> dict[str, PairingPlan]:
    """A plan for each source that an objective or the layer rates pair blocks with."""
    users = {f"objective {key!r}": objective.source for key, objective in objectives.items() if objective.needs_plan}
    users |= {"layer_rates": rates.teacher_name} if rates else {}
    wanted = {name: user for user, name in users.items() if name in sources}
    pair = images(2) if wanted else None
    pixels = None if pair is None else next(iter(pair))["pixel_values"]
    plans = {}
    for name, user in wanted.items():
        try:
            plans[name] = plan(student, sources[name], pixel_values=pixels)
        except ValueError as error:
            raise ValueError(f"{user}: {error}") from error
    return plans


def _freeze_unread(student: nn.Module, images: Images) -> list[str]:
    pair = images(2) if is_headless(student) else None
    if pair is None:
        return []
    names = freeze_unread(student, next(iter(pair))["pixel_values"].to(next(student.parameters()).device))
    return [f"the student's {', '.join(names)} lead to nothing that is compared, and are frozen."] if names else []


def _split_terms(config: DistillationConfig) -> Literal["terms", "pairs"] | None:
    rule = config.build_rule()
    return None if rule is None else "pairs" if rule.local else "terms"


def _starting_point(
    student: nn.Module, config: DistillationConfig, processing_class: Any, device: torch.device | None
) -> StartingPoint:
    """What the student started from, as the config says."""
    if config.start is not None:
        start = StartingPoint.from_path(config.start, student, processing_class)
        for note in start.notes:
            logger.info(note.replace("the teacher", "the start"))
        return start
    if dist.is_initialized() and dist.get_world_size() > 1:
        # As DDP will do when it wraps: a head with random weights is another one on every rank.
        if device is not None:
            student.to(device)
        for tensor in (*student.parameters(), *student.buffers()):
            dist.broadcast(tensor.data, 0)
    return StartingPoint(student)
