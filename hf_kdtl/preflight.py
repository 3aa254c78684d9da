"""Before any training: what pairs, what each objective will cost, what will not work, and what to type instead."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.config import DistillationConfig, entry_key
from hf_kdtl.functional.random import Draws, select_images
from hf_kdtl.models.forward.classifier import blank_pixels
from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.pairing import PairingPlan, plan
from hf_kdtl.models.teachers import SignalSource, as_source
from hf_kdtl.models.teachers.source import called
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives import Objective
from hf_kdtl.objectives.estimators import missing_derivative
from hf_kdtl.optim import LayerRates
from hf_kdtl.trainer.build import build_distiller, match_teacher
from hf_kdtl.trainer.checks import setting_problems
from hf_kdtl.trainer.contracts import check_config
from hf_kdtl.trainer.distiller import Distiller, micro_batch_counts
from hf_kdtl.trainer.teacher_checks import check_teacher_usage
from hf_kdtl.utils.distributed import fsdp_requested

TASK, ALONE = "task", "task alone"


@dataclass
class Cost:
    """One objective in addition to the task, on one batch, as a multiple of the task alone; of a student without a
    head one alone, as a multiple of the first."""

    key: str
    time: float
    memory: float


@dataclass
class Report:
    """What preflight found. `str(report)` is what a person reads.

    Args:
        pairing: the plan's table, or why there is none.
        notes: labels, pixels, kernels: what was decided.
        costs: time and memory held for the backward pass, against the step of `base` alone.
        warnings: what will not be as expected, and what to type instead.
        problems: what will not run; each says what to type.
        rates: the layers' learning rates as a table; empty where there is one rate.
        base: the task; of a student without a head the first objective.
    """

    pairing: str
    notes: list[str] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    rates: str = ""
    base: str = TASK

    def __str__(self) -> str:
        lines = ["Pairing", self.pairing, ""]
        lines += ["Learning rates", self.rates, ""] if self.rates else []
        lines += [f"Cost of a step, {self.base} alone = 1.00 (one batch, this machine)"]
        plus = "task + " * (self.base == TASK)
        lines += [f"  {plus}{c.key:<22} time {c.time:5.2f}   memory {c.memory:5.2f}" for c in self.costs]
        for title, entries in (("Decided", self.notes), ("Mind", self.warnings), ("Will not run", self.problems)):
            lines += ["", title, *(f"  - {entry}" for entry in entries or ["nothing"])]
        return "\n".join(lines)


def preflight(
    student: nn.Module,
    teacher: Any,
    config: DistillationConfig,
    pixel_values: Tensor | None = None,
    processing_class: Any = None,
) -> Report:
    """Look at the pair and the settings without training. The models are left as they were.

    Args:
        teacher: a model, a `Teacher`, a path, several of them by name, or None.
        pixel_values: (B, C, h, w) as the student will be given; by default blank ones of its config's image size.
        processing_class: the student's image processor.

    Cost: a few forwards and backwards of one batch for each objective.

    Raises:
        TypeError: for a `config` that is no DistillationConfig.
    """
    check_config(config)
    pixels = blank_pixels(student) if pixel_values is None else pixel_values
    objectives = config.build_objectives()
    report = Report(pairing="no teacher, no pairs.", warnings=_warnings(objectives, config))
    report.problems += setting_problems(config, student)
    start = None
    try:
        check_teacher_usage(teacher, config)
        source = None if teacher is None else as_source(teacher)
        if source is not None:
            match_teacher(source, student, processing_class, objectives.values())
            seen = {"the student": pixels} | {called(n): one.pixels(pixels) for n, one in source.members().items()}
            report.notes += [*source.notes, *(_pixel_note(who, values) for who, values in seen.items())]
        _pair(report, student, source, config, pixels)
        if any(objective.source == "start" for objective in objectives.values()):
            start = StartingPoint(student)
            if config.start is not None:
                start = StartingPoint.from_path(config.start, student, processing_class)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        return report
    options = {"processing_class": processing_class, "start": start, "sharded": fsdp_requested()}
    _measure(report, student, source, config, pixels, options)
    return report


def _pair(
    report: Report, student: nn.Module, source: SignalSource | None, config: DistillationConfig, pixels: Tensor
) -> None:
    """Report the pairs and the layers' rates. Only objectives that pair layers need a plan; others run without one."""
    tables, plans, options = [], dict[str, PairingPlan](), config.rate_options
    for name, one in (source.members() if source is not None else {}).items():
        title = "" if name == "teacher" else f"With {called(name)}\n"
        try:
            plans[name] = found = plan(student, one, pixel_values=pixels)
            tables.append(f"{title}{found}")
            report.notes += [
                f"{who}'s attention comes as finished weights: objectives on it run the eager kernel."
                for who, model in (("the student", found.student), (called(name), found.teacher))
                if model.weights_only
            ]
        except ValueError as error:
            tables.append(f"{title}none: {error}")
    report.pairing = "\n\n".join(tables) or report.pairing
    try:
        if options is not None:
            pairing = plans.get(options.teacher_name)
            report.rates = LayerRates(options, student, pairing, seed=config.seed).table(student)
    except ValueError as error:
        report.problems.append(str(error))


def _measure(
    report: Report,
    student: nn.Module,
    source: SignalSource | None,
    config: DistillationConfig,
    pixels: Tensor,
    options: dict[str, Any],
) -> None:
    """Build and try each objective, together with the task where the student has classes, and report what it costs.

    Args:
        options: of `build_distiller`.
    """
    model_config: Any = student.config
    labels = torch.arange(pixels.shape[0], device=pixels.device) % model_config.num_labels
    if is_multi_label(student):
        labels = torch.nn.functional.one_hot(labels, model_config.num_labels).float()
    inputs = {"pixel_values": pixels, "labels": labels}
    steps = {}
    task: list[dict[str, Any]] = [] if is_headless(student) else [{"name": TASK, "key": ALONE}]
    added = {entry_key(entry): [entry | {"weight": 1.0}] for entry in config.entries if entry["name"] != TASK}
    tried: dict[str, list[Any]] = {ALONE: []} | added if task else added
    for key, entries in tried.items():
        one: Any = copy.copy(config)
        one.layer_rates = one.gradient_rule = None
        one.objectives = [*task, *entries]
        try:
            # A copy: an evaluation's or BatchNorm's state, and gradients, must not be left behind.
            trained = copy.deepcopy(student).train()
            distiller = build_distiller(trained, source, one, images=partial(_repeated, inputs), **options)
            report.notes += distiller.notes
            problem = _first_step(distiller.to(pixels.device), inputs, key)
            report.problems += [problem] if problem else []
            steps[key] = distiller
        except (ValueError, RuntimeError) as error:
            without = missing_derivative(error)
            report.problems.append(f"objective {key!r}: {without}" if without else str(error))
    report.base = TASK if task else next(iter(added))
    if (base := ALONE if task else report.base) in steps:
        report.costs = _costs(steps, inputs, base)


def _repeated(inputs: dict[str, Tensor], images: int) -> list[dict[str, Tensor]]:
    """The batch as often as it takes to have so many images."""
    return [inputs] * -(-images // len(inputs["pixel_values"]))


def _costs(steps: dict[str, Distiller], inputs: dict[str, Tensor], alone: str) -> list[Cost]:
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(5):  # in turns: a machine that slows down slows all of them
        for key, distiller in steps.items():
            times[key].append(timed(distiller, inputs))
    held = {key: _held(distiller, inputs) for key, distiller in steps.items()}
    base = statistics.median(times[alone]), held[alone]
    return [Cost(key, statistics.median(times[key]) / base[0], held[key] / base[1]) for key in steps if key != alone]


def _first_step(distiller: Distiller, inputs: dict[str, Tensor], key: str) -> str:
    """One step in which every image takes part; says so where an objective moves nothing that is trained."""
    draws = Draws(0, 0, tuple(range(inputs["pixel_values"].shape[0])), include_all=True)
    distiller(inputs, draws, micro_batch_counts(inputs))["loss"].backward()
    distiller.zero_grad()
    term = distiller.terms(inputs, draws)[1].get(key)
    trained = [p for p in distiller.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(term.sum(), trained, allow_unused=True) if term is not None else ()
    if term is None or any(g is not None for g in found):
        return ""
    return f"objective {key!r} moves none of the student's trainable parameters; unfreeze more, or leave it out."


def _step(distiller: Distiller, inputs: dict[str, Tensor]) -> None:
    distiller(inputs, _usual_draws(distiller, inputs), micro_batch_counts(inputs))["loss"].backward()
    distiller.zero_grad()


def _usual_draws(distiller: Distiller, inputs: dict[str, Tensor]) -> Draws:
    """Draws by which as many images take part as do in the mean, at least one: else a small batch may show none."""
    pixels = inputs["pixel_values"]
    positions, fraction = tuple(range(len(pixels))), distiller.student_needs.fraction or 1.0
    wanted = max(1, round(fraction * len(pixels)))
    tried = (Draws(0, step, positions) for step in range(500))
    return next(
        (d for d in tried if int(select_images(d, fraction, pixels).sum()) == wanted), Draws(0, 0, positions, True)
    )


def timed(distiller: Distiller, inputs: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    cuda = inputs["pixel_values"].is_cuda
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    _step(distiller, inputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _held(distiller: Distiller, inputs: dict[str, Tensor]) -> int:
    """Bytes that the graph keeps for the backward pass: what grows with an objective, on any device."""
    own = {p.untyped_storage().data_ptr() for p in distiller.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        distiller(inputs, _usual_draws(distiller, inputs), micro_batch_counts(inputs))
    return sum(kept.values())


def _pixel_note(who: str, pixels: Tensor) -> str:
    size = f"{pixels.shape[-2]} x {pixels.shape[-1]}"
    return f"{who} sees {size}, mean {pixels.mean():.2f}, standard deviation {pixels.std():.2f}."


def _warnings(objectives: dict[str, Objective], config: DistillationConfig) -> list[str]:
    """What the settings make of these objectives."""
    found = []
    batch = [key for key, o in objectives.items() if o.reduction == "batch" and not o.of_weights]
    if batch and (config.gradient_accumulation_steps > 1 or config.world_size > 1):
        found.append(
            f"{', '.join(batch)} is a statistic of the micro-batch of {config.per_device_train_batch_size} images on "
            "each process: it changes with gradient_accumulation_steps and the number of processes."
        )
    held = [entry["name"] for entry in config.entries if entry["name"] == "l2_sp"]
    if held and config.weight_decay:
        found.append(
            f"weight_decay is {config.weight_decay:g} and pulls to 0, while l2_sp pulls to the start: set it to 0."
        )
    return found
