"""The model that a student started from: what it has learned to do, and its weights."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from hf_kdtl.models.adapters import adapted, adapters_off, check_base_kept
from hf_kdtl.models.forward.capture import Needs, WeightPair
from hf_kdtl.models.forward.classifier import classifiers
from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.teachers.backbone import open_backbone
from hf_kdtl.models.teachers.processor_files import open_processor
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.models.teachers.teacher import Teacher

logger = logging.get_logger(__name__)


class StartingPoint(Teacher):
    """The student as it was when training began, or a model of its architecture that was saved earlier.

    A frozen copy, one more set of weights in memory. Of a student with adapters it is the student itself with its
    adapters off, and nothing is copied.
    """

    def __init__(self, student: nn.Module, saved: Teacher | None = None):
        """The student as it is now; or a model of its architecture, in place of it.

        Raises:
            ValueError: for a student with adapters that changed its weights when they were added.
        """
        self.kept: Path | None = None
        self.adapted = saved is None and adapted(student)
        if self.adapted:
            check_base_kept(student, "the start")
            self._hold(student)
        elif saved is None:
            super().__init__(copy.deepcopy(student))
        else:
            super().__init__(saved.model, saved.processing_class)

    @classmethod
    def from_path(cls, path: str | Path, student: Any, processing_class: Any) -> StartingPoint:
        """A folder or Hub name, of the student's architecture; its head may be for other classes.

        Raises:
            OSError: when nothing is there.
            ValueError: when its weights are not those of the student's architecture, naming them.
        """
        if adapted(student):
            raise ValueError(
                f"start is {str(path)!r} and the student has adapters, whose start is the student with its adapters "
                "off. Leave start out."
            )
        kernel = getattr(student.config, "_attn_implementation", None)
        try:
            options = {"dtype": next(student.parameters()).dtype, "attn_implementation": kernel}
            opened: Any = (
                open_backbone(path, role="the start", **options)
                if is_headless(student)
                else (open_classifier(path, role="the start", keep_head=False, **options))
            )
            saved = Teacher.of(opened, open_processor(path, role="the start"))
        except (OSError, ValueError) as error:
            raise type(error)(str(error).replace("the teacher", "the start")) from error
        start = cls(student, saved)
        start.new_head, start.unread, start.notes = saved.new_head, saved.unread, [*saved.unread]
        if start.processing_class is not None:
            if processing_class is None:
                raise ValueError(
                    f"the start {str(path)!r} has its own image processor and the student's is unknown, so its pixels "
                    "cannot be matched. Pass processing_class=<the student's image processor> to the trainer."
                )
            start._pixels = start._match_pixels(processing_class)
        weight_pairs(student, start.model)  # refuses another architecture now
        return start

    def in_its_shape(self, load: Callable[[Any], None]) -> StartingPoint:
        """Another one of this one's architecture, into which `load` puts weights."""
        other = StartingPoint(self.model)
        load(other.model)
        return other

    def eval_context(self) -> Any:
        """A context in which the model answers as it did at the start."""
        return adapters_off(self.model) if self.adapted else super().eval_context()

    def save(self, folder: Path) -> None:
        """Keep it with the run, completely or not at all. There is nothing to keep of a student with adapters.

        Raises:
            ValueError: for a model that cannot be saved.
        """
        if self.adapted or (self.kept == folder and folder.is_dir()):
            return
        model: Any = self.model
        if not hasattr(model, "save_pretrained"):
            raise ValueError(
                f"the start is {type(model).__name__}, which has no save_pretrained, so the run could not be resumed. "
                "Use a model of transformers, or save_strategy='no'."
            )
        part = folder.with_name(f"{folder.name}.part")
        model.save_pretrained(part)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(part)
        old = folder.with_name(f"{folder.name}.old")  # of the run that was here before
        shutil.rmtree(old, ignore_errors=True)
        if folder.is_dir():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        self.kept = folder

    def to(self, device: torch.device) -> StartingPoint:
        """Move to a device."""
        super().to(device)
        return self

    def unserved(self, needs: Needs) -> str:
        """It also holds the student's weights."""
        return super().unserved(replace(needs, weights=False)).replace("the teacher", "the start")

    @property
    def fingerprint(self) -> str:
        """A hash of its weights; empty for a student with adapters, which keeps them itself."""
        return "" if self.adapted else super().fingerprint

    def weights(self, student: nn.Module) -> list[WeightPair]:
        """The student's trainable tensors, and what they were."""
        return weight_pairs(student, self.model)


def weight_pairs(student: nn.Module, start: nn.Module) -> list[WeightPair]:
    """The student's trainable tensors paired with the start's, by name; under LoRA the differences paired with zeros.

    Raises:
        ValueError: when a tensor outside the head has no counterpart of its shape, naming them.
    """
    head = {id(p) for module in classifiers(student) for p in module.parameters()}
    if adapted(student):
        return _adapted_pairs(student, head)
    then, pairs, lost = dict(start.named_parameters()), [], []
    for name, now in student.named_parameters():
        if not now.requires_grad:
            continue
        its = then.get(name)
        if id(now) in head:
            pairs.append(WeightPair(name, now, None, True))
        elif its is None or its.shape != now.shape:
            found = "missing" if its is None else tuple(its.shape)
            lost.append(f"{name} {tuple(now.shape)} ({found})")
        else:
            pairs.append(WeightPair(name, now, its.detach(), False))
    if lost:
        raise ValueError(
            f"the start, {type(start).__name__}, has not the weights of the student, {type(student).__name__}: "
            f"{', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''} (the head is left out). "
            "Give start=<a model of the student's architecture and size>, or leave it out for the weights that the "
            "student begins with."
        )
    return pairs


def _adapted_pairs(student: nn.Module, head: set[int]) -> list[WeightPair]:
    pairs, seen = [], set()
    for name, module in student.named_modules():
        layer: Any = module
        if not (hasattr(layer, "get_delta_weight") and hasattr(layer, "active_adapters")):
            continue
        learned = [n for n, p in module.named_parameters() if p.requires_grad]
        if other := [n for n in learned if not n.startswith(("lora_A", "lora_B", "lora_embedding"))]:
            raise ValueError(
                f"the adapter of {name} trains {other[:3]} in addition to A and B, so what it adds to the weight is "
                "not their product, which l2_sp holds. Use plain LoRA, or train without adapters."
            )
        for adapter in layer.active_adapters:
            if adapter in getattr(layer, "lora_A", {}):
                now = layer.get_delta_weight(adapter)
                pairs.append(WeightPair(name, now, torch.zeros_like(now), False))
        seen |= {id(p) for p in module.parameters()}
    for name, now in student.named_parameters():
        if not now.requires_grad or id(now) in seen:
            continue
        # In addition to adapters PEFT trains complete modules, and keeps their original.
        kept = re.sub(r"modules_to_save\.[^.]+", "original_module", name)
        then = dict(student.named_parameters()).get(kept) if kept != name else None
        if id(now) not in head and then is None:
            raise ValueError(
                f"the student's {name} is trained in addition to its adapters and its start is not kept, so l2_sp "
                "cannot pull to it. Use LoRA, or train without adapters."
            )
        pairs.append(WeightPair(name, now, None if id(now) in head else then.detach(), id(now) in head))  # type: ignore[union-attr]
    return pairs
