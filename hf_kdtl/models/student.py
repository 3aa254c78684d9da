"""A student cut out of its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kdtl.models.cutting.budget import Budget, solve
from hf_kdtl.models.cutting.families import Sizes, cut_config, family_of, sizes_of
from hf_kdtl.models.cutting.importance import Scores, first_order
from hf_kdtl.models.cutting.plan import CutPlan, cost_of, like, neurons_of, on_meta
from hf_kdtl.models.cutting.request import Number, kept_blocks, requested_sizes
from hf_kdtl.models.cutting.weights import copy_weights
from hf_kdtl.models.forward.capture import Needs
from hf_kdtl.models.forward.classifier import blank_pixels
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.utils.options import check_known

LAYERS = 6  # where nothing is asked for


@dataclass(frozen=True)
class Cut:
    """What is asked of a student: `make_student`'s arguments but for teacher and data."""

    layers: Number | Sequence[int] | None = None
    heads: Number | None = None
    mlp: Number | None = None
    width: Number | None = None
    importance: str = "uniform"
    flops: Number | None = None
    parameters: Number | None = None
    latency_ms: Number | None = None

    def __post_init__(self):
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        check_known("importance", self.importance, ["uniform", "first_order"])
        if len(given := self.budgets) > 1:
            raise ValueError(f"found {' and '.join(b.kind for b in given)}; expected one budget at most.")

    @property
    def budgets(self) -> list[Budget]:
        """The budget, if any."""
        kinds = ("flops", "parameters", "latency_ms")
        return [Budget(kind, getattr(self, kind)) for kind in kinds if getattr(self, kind) is not None]


def make_student(
    teacher: PreTrainedModel | Teacher | str | Path,
    layers: Number | Sequence[int] | None = None,
    *,
    heads: Number | None = None,
    mlp: Number | None = None,
    width: Number | None = None,
    importance: str = "uniform",
    data: Any = None,
    flops: Number | None = None,
    parameters: Number | None = None,
    latency_ms: Number | None = None,
) -> PreTrainedModel:
    """A smaller model of the teacher's class, cut out of it: blocks, heads, neurons and channels are left out.

    A whole number is a count, a number with a point in (0, 1] a share of the teacher's: `heads=2`, `mlp=0.5`. The
    student computes what the teacher does with the outputs of the removed blocks, heads and neurons set to zero,
    exactly; with everything kept, the teacher's logits. A cut `width` has no such law: layer norms mix all channels.

    What a family can lose: ViT, DeiT, DINOv2 (with and without registers), BEiT, ViT-MSN, I-JEPA: all four. SigLIP,
    CLIP, DINOv3: blocks, MLP and width, whose heads follow (a head is width // heads there). Swin: blocks of each
    stage and MLP. ConvNeXt: blocks of each stage. Others whose depth is config.num_hidden_layers: blocks.

    Args:
        teacher: a vision model of transformers with or without a classifier, a Teacher, or a path or Hub name. It
            is left as it was.
        layers: blocks to keep, a count or a share; for Swin and ConvNeXt a count for each stage in a list, or a share.
            By default 6 where nothing else is asked for, otherwise all.
        heads: attention heads of each block to keep.
        mlp: neurons of each block's MLP to keep. DINOv2 has whole multiples of its width alone.
        width: channels of the residual stream to keep, evenly spaced, the same everywhere. Heads and neurons stay;
            where the MLP is a ratio of the width (DINOv2), it follows.
        importance: which blocks, heads and neurons stay. "uniform": evenly spaced ones; of the blocks those of
            `uniform_layers`, so that block s of the student starts as the teacher block that objectives pair it with:
            6 of 12 keeps 1, 3, ... 11. "first_order": those of the highest `importance.first_order` on `data` (in
            each block as many); for Swin, whose blocks alternate, the blocks are evenly spaced nevertheless.
        data: for "first_order": a data set or list of rows with pixel_values, as the teacher reads them, and labels;
            256 are used.
        flops, parameters, latency_ms: a budget, one of them: up to 1 a share of the teacher's (of the first two),
            above it the number. Depth, heads and MLP, as far as they are not given, are chosen so that the most
            reduced is reduced least; the plan is printed. Latency is measured here, on the teacher's device, of one
            image.

    Returns:
        The student, in eval mode, every parameter trainable, on the device of the teacher and in its dtype, but of a
        teacher in half precision a float32 one, because half-precision weights do not train. It shares no memory with
        the teacher, and `save_pretrained` and `from_pretrained` work as for any model of its class. What depends on
        depth alone (stochastic depth) is the student's own, from its config.

    Raises:
        TypeError: `teacher` is not a vision model of transformers.
        ValueError: a number out of range or one that does not divide; what the family cannot lose; a budget that
            cannot be met, with the nearest that can; first_order without data; blocks not found; a teacher whose
            tensors are not those of its own config (adapters, a replaced head), so that the student would not be a
            copy; a file that lacks weights.

    Sources: removing heads, Michel et al. 2019, arXiv 1905.10650; first-order scores, Molchanov et al. 2019, arXiv
    1906.10771; evenly spaced channels, Xu et al. 2023, "Initializing models with larger ones", arXiv 2311.18823
    [its code]; the choice under a budget is ours.

    Example:
        make_student(teacher, heads=2, mlp=0.5)
        make_student(teacher, flops=0.5, importance="first_order", data=train_dataset)
    """
    cut = Cut(layers, heads, mlp, width, importance, flops, parameters, latency_ms)
    model = _vision_model(teacher)
    scores = first_order(model, data) if cut.importance == "first_order" else None
    plan = plan_cut(model, cut, scores)
    if cut.budgets:
        print(plan)
    return build(model, plan, scores)


def plan_cut(teacher: Any, cut: Cut, scores: Scores | None = None) -> CutPlan:
    """The student that `make_student` would build; raises what it would raise."""
    model = _vision_model(teacher)
    full = sizes_of(model)
    asked = (cut.heads, cut.mlp, cut.width, *cut.budgets)
    layers = LAYERS if cut.layers is None and all(value is None for value in asked) else cut.layers
    sizes, taken = requested_sizes(model, full, layers, cut.heads, cut.mlp, cut.width), None
    for budget in cut.budgets:
        given = {"depths": cut.layers, "heads": cut.heads, "mlp": cut.mlp}
        sizes, taken = solve(model, full, sizes, {name for name, value in given.items() if value is None}, budget)
    return plan_sizes(model, sizes, scores, taken)


def plan_sizes(
    model: Any, sizes: Sizes, scores: Scores | None = None, latency_ms: tuple[float, float] | None = None
) -> CutPlan:
    """The student of given sizes."""
    full, family = sizes_of(model), family_of(model.config)
    alternate = family is not None and family.alternate
    blocks = kept_blocks(full, sizes, alternate, None if scores is None else scores.blocks)
    config = cut_config(model.config, sizes, blocks)
    before, after = (on_meta(model, this) for this in (model.config, config))
    pixels = blank_pixels(model, default=224)
    neurons = neurons_of(before), neurons_of(after)
    costs = cost_of(before, pixels), cost_of(after, pixels)
    importance = "uniform" if scores is None else "first_order"
    return CutPlan(config, blocks, full, sizes, *costs, neurons, importance, latency_ms)


def build(teacher: PreTrainedModel, plan: CutPlan, scores: Scores | None = None) -> PreTrainedModel:
    """The student of a plan."""
    with torch.random.fork_rng(devices=[]):  # its own weights are all replaced, so the caller's draws go on as before
        student: Any = like(teacher, plan.config)
    copy_weights(teacher, student, plan.blocks, plan.full, scores)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in student.parameters())
    return (student.float() if half else student).to(teacher.device).eval()


def _vision_model(teacher: Any) -> Any:
    if isinstance(teacher, str | Path):
        teacher = Teacher.from_pretrained(teacher)
    if isinstance(teacher, Teacher):
        if teacher.new_head:
            raise ValueError(teacher.unserved(Needs(logits=True)))
        teacher = teacher.classifier()
    if not isinstance(teacher, PreTrainedModel) or teacher.main_input_name != "pixel_values":
        raise TypeError(
            f"a student can be cut out of a vision model of transformers, found {type(teacher).__name__}. Load the "
            "teacher with AutoModelForImageClassification.from_pretrained; if it is wrapped by PEFT, pass "
            "teacher.merge_and_unload()."
        )
    return teacher
