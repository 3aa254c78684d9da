"""Students that are cut out of a teacher: the flags, the cut, and its stages."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from transformers import AutoModelForImageClassification

from hf_kdtl.data import ImageData, ImageDataset
from hf_kdtl.models import Teacher
from hf_kdtl.models.cutting.importance import Scores, first_order
from hf_kdtl.models.cutting.plan import CutPlan
from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.labels import set_class_names
from hf_kdtl.models.student import Cut, build, plan_cut

IMPORTANCE = "Which blocks, heads and neurons stay: uniform (evenly spaced), or first_order (by the loss)."


@dataclass
class CutOptions:
    """The student is cut out of the teacher; counts, or shares with a point."""

    student_layers: str | None = field(
        default=None,
        metadata={"help": "Cut the student out of the teacher: this many of its blocks, or a share: 0.5."},
    )
    student_heads: str | None = field(default=None, metadata={"help": "Heads of each block to keep: 2, or 0.5."})
    student_mlp: str | None = field(default=None, metadata={"help": "Neurons of each block to keep: 768, or 0.5."})
    student_width: str | None = field(default=None, metadata={"help": "Channels to keep: 192, or 0.5."})
    student_flops: float | None = field(
        default=None, metadata={"help": "A budget, up to 1 a share: depth, heads and MLP are chosen to fit."}
    )
    student_parameters: float | None = field(default=None, metadata={"help": "The same for parameters."})
    student_importance: str = field(default="uniform", metadata={"help": IMPORTANCE})
    stages: int = field(default=1, metadata={"help": "Cut in this many steps, with training after each."})

    def __post_init__(self) -> None:
        for name in ("student_layers", "student_heads", "student_mlp", "student_width"):
            setattr(self, name, number(name, getattr(self, name)))
        if self.stages < 1 or (self.stages > 1 and self.cut is None):
            raise ValueError(
                f"stages is {self.stages}; expected 1 or more, and a student that is cut out of the teacher: "
                "--student_flops 0.4 --stages 3."
            )

    @property
    def cut_flags(self) -> list[str]:
        """The flags that ask for a cut."""
        names = ("layers", "heads", "mlp", "width", "flops", "parameters")
        return [f"student_{name}" for name in names if getattr(self, f"student_{name}") is not None]

    @property
    def cut(self) -> Cut | None:
        """What is asked of the student; None where it is not cut out of the teacher."""
        if not self.cut_flags:
            return None
        given: dict[str, Any] = {flag.removeprefix("student_"): getattr(self, flag) for flag in self.cut_flags}
        return Cut(**given, importance=self.student_importance)


def number(name: str, value: Any) -> Any:
    """A count or a share as a flag has it: "6" is six, "0.5" is half, "1.0" is all, "[2, 2, 4, 2]" is for stages.

    Raises:
        ValueError: for anything else.

    >>> number("layers", "6"), number("layers", "0.5"), number("layers", "[1, 2]")
    (6, 0.5, (1, 2))
    """
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    text = str(list(value) if isinstance(value, list | tuple) else value).strip()
    try:
        if text.startswith("["):
            return tuple(int(part) for part in text.strip("[]").split(","))
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise ValueError(
            f"{name} is {value!r}; expected a whole number, a share such as 0.5, or [2, 2, 4, 2] for the stages of "
            "Swin and ConvNeXt."
        ) from error


def scored(teacher: Teacher, importance: str, data: ImageData | None) -> Scores | None:
    """The importance of the teacher's parts, on its training images, where it is asked for."""
    if importance != "first_order":
        return None
    if data is None:
        raise ValueError("importance first_order needs labelled images: type --dataset.")
    model = teacher.classifier()
    if teacher.processing_class is None:
        raise ValueError("importance first_order needs the teacher's image processor, and none is saved with it.")
    return first_order(model, ImageDataset(data.in_order(model).train, teacher.processing_class))


_made: WeakKeyDictionary[Teacher, dict[Cut, tuple[CutPlan, Scores | None]]] = WeakKeyDictionary()


def planned(teacher: Teacher, cut: Cut, data: ImageData | None) -> tuple[CutPlan, Scores | None]:
    """The plan of a cut; made once for a teacher, so that all runs have the same student."""
    made = _made.setdefault(teacher, {})
    if cut not in made:
        scores = scored(teacher, cut.importance, data)
        made[cut] = plan_cut(teacher, cut, scores), scores
    return made[cut]


def cut_student(teacher: Teacher, cut: Cut, data: ImageData) -> Any:
    """The student of a cut, with a new head for the classes of the data where the teacher has none."""
    plan, scores = planned(teacher, cut, data)
    student = build(teacher.classifier(), plan, scores)
    return _with_head(student, data.label_names) if is_headless(student) else student


def _with_head(backbone: Any, names: Sequence[str]) -> Any:
    config = copy.deepcopy(backbone.config)
    set_class_names(config, names)
    model: Any = AutoModelForImageClassification.from_config(config)
    lacking = getattr(model, model.base_model_prefix).load_state_dict(backbone.state_dict(), strict=False).missing_keys
    if lacking:
        raise ValueError(
            f"a {type(backbone).__name__} does not fit into {type(model).__name__}, which lacks "
            f"{', '.join(lacking[:4])}. Type hf-kdtl cut --teacher <it> --output_dir <new>; then --student <new>."
        )
    return model
