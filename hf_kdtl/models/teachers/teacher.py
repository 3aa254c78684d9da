"""A live, frozen vision model as the source of teacher signals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.embedding import POOLS, Pool, is_headless, untrained_pooler
from hf_kdtl.models.forward.geometry import ModelGeometry, describe
from hf_kdtl.models.forward.partial_batch import capture_in_chunks, capture_subset
from hf_kdtl.models.labels import MULTI_LABEL, classes_of, is_multi_label, match_labels
from hf_kdtl.models.run_context import is_sharded, low_precision, nonsmooth_layers, not_differentiable
from hf_kdtl.models.teachers.backbone import check_reads_images, no_classifier, open_vision_model, prepared
from hf_kdtl.models.teachers.facts import in_order, source_info
from hf_kdtl.models.teachers.flat_patches import FlatPatches, SquareProcessor
from hf_kdtl.models.teachers.pixels import PixelAdapter, check_channels, match_pixels
from hf_kdtl.models.teachers.processor_files import check_processor, open_processor
from hf_kdtl.models.teachers.resolve import Opened, missing_head
from hf_kdtl.models.teachers.sketches import sketched
from hf_kdtl.models.teachers.source import Batch, SignalSource, SourceFacts, SourceInfo
from hf_kdtl.utils.options import check_option, is_integer

logger = logging.get_logger(__name__)
OPENERS: list[Callable[[str | Path, dict[str, Any]], Any]] = []  # other kinds of teachers, or None: see __init__.py


class Teacher(SignalSource):
    """A frozen image classifier or vision model without a head, and the pixels and classes it understands.

    Not a module of the student's container: its weights are in no optimizer, no checkpoint and no gradient. It stays
    in eval mode and keeps its own dtype. `match` adapts it to the student's pixel format and class order: it sees the
    student's pixels re-normalised and resized to its own image processor's mean, std and size.

    Args:
        model: the classifier, or what AutoModel opens. It is set to eval mode and its parameters to
            requires_grad=False.
        processing_class: its image processor. Without one it sees the student's pixels as they are, and says so.
        pool: what its embedding of an image is. "auto": what its classifier reads; without one image_embeds or
            pooler_output where their weights are trained, else the class token, else the mean of the patch tokens,
            both after the last norm. "pooler", "class" or "mean" take that one.
        teacher_batch: images in each of its forwards, whatever the batch; the last one is filled up. By default the
            batch. With the number of a store (hf-kdtl cache) it answers bitwise as the store does.
    """

    of_each_class = False  # whether the sigmoid of an output is a probability whatever it was trained for
    _multi_label = False  # whether the student has several labels an image
    new_head: Sequence[str] = ()  # tensors of the head that are random, because its file has none
    unread: Sequence[str] = ()  # a sentence where its file holds further tensors
    pool: Pool = "auto"
    pooler = True  # whether its pooler's weights are trained
    teacher_batch: int | None = None

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any = None,
        *,
        pool: Pool = "auto",
        teacher_batch: int | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the teacher is {type(model).__name__}; expected a model, a hf_kdtl.models.Teacher, or a path."
            )
        check_option("the teacher", "pool", pool, pool in POOLS, " or ".join(map(repr, POOLS)))
        check_reads_images(model, "the teacher")
        model = prepared(model)
        if isinstance(model, FlatPatches) and processing_class is not None:
            processing_class = SquareProcessor(processing_class)
        self.pool, self.pooler = pool, not (is_headless(model) and untrained_pooler(model))
        self._hold(model.eval().requires_grad_(False), check_processor(processing_class))
        check_option("the teacher", "teacher_batch", teacher_batch, teacher_batch is None or is_integer(teacher_batch),
                     "a whole number of at least 1, or nothing")  # fmt: skip
        self.teacher_batch = teacher_batch

    def _hold(self, model: Any, processing_class: Any = None) -> None:
        """Take a model as it is; subclasses whose model trains elsewhere do not freeze it."""
        self.model: Any = model
        self.processing_class = processing_class
        self.notes, self.order, self._fingerprint = [*self.unread], None, ""
        self._pixels: PixelAdapter | None = None
        self._geometry: dict[tuple[int, ...], ModelGeometry] = {}

    @classmethod
    def from_pretrained(cls, path: str | Path, *, pool: Pool = "auto", **model_options: Any) -> Teacher:
        """What a folder or Hub name holds: a classifier, or a vision model without a head (DINOv2, DINOv3, the vision
        tower of CLIP or SigLIP, ...); with the image processor saved with it, where present.

        Args:
            pool: as of the class.
            model_options: of the model's from_pretrained.

        With `class_names` or `templates` a `TextHeadTeacher` of a model of images and texts (CLIP, SigLIP); of a
        folder that `hf-kdtl cache` wrote a `StoredTeacher`.

        Raises:
            OSError: when nothing is there or it cannot be read, with what to type.
            ValueError: when the file lacks weights of the backbone, or holds no vision model.
        """
        for opener in OPENERS:
            if (other := opener(path, model_options)) is not None:
                return other
        opened = open_vision_model(path, role="the teacher", **model_options)
        return cls.of(opened, open_processor(path, role="the teacher", **model_options), pool)

    @classmethod
    def of(cls, opened: Opened, processing_class: Any, pool: Pool = "auto") -> Teacher:
        """A model that was opened, with what its file did not hold."""
        teacher = cls(opened.model, processing_class, pool=pool)
        teacher.new_head, teacher.unread, teacher.notes = opened.new_head, opened.unread, [*opened.unread]
        teacher.pooler = teacher.pooler and getattr(opened, "pooler", True)
        teacher._fingerprint = fingerprint(teacher.model, gathered=True) if is_sharded(teacher.model) else ""
        return teacher

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        """Learn the student's pixel format and class order.

        Args:
            student: the model whose pixels the teacher will be given.
            processing_class: the student's image processor, or None where unknown.
            compare_classes: whether any objective compares class outputs; otherwise the classes may differ.

        Raises:
            TypeError: when classes are compared and the teacher is not an image classifier of transformers.
            ValueError: when the teacher shares weights with the student, when its processor cannot be matched
                because the student's is unknown, or when the classes differ.
        """
        own = {id(p) for p in student.parameters()}
        if any(id(p) in own for p in self.model.parameters()):
            raise ValueError(
                "teacher and student share parameters, so freezing the teacher froze the student. Pass a copy: "
                "copy.deepcopy(model); or for a student with adapters teacher='self', which is it without them."
            )
        self.notes, self.order = [*self.unread], None
        self._geometry, self._multi_label = {}, is_multi_label(student)
        if compare_classes:
            self._check_is_classifier()
            self._check_head()
            self.order, note = match_labels(classes_of(student), self.model.config)
            self.notes.append(note)
        self._pixels = self._match_pixels(processing_class)

    def _check_is_classifier(self) -> None:
        if hasattr(self.model, "config"):
            return
        inner = "teacher.module" if isinstance(getattr(self.model, "module", None), nn.Module) else None
        raise TypeError(
            f"the teacher is a {type(self.model).__name__} without a config; expected an image classifier of "
            "transformers, whose config says what its classes are and whose forward takes pixel_values and gives "
            f"logits. {f'Pass {inner}' if inner else 'A model of timm opens as one by its Hub name, timm/...'}."
        )

    def _check_head(self) -> None:
        if reason := self._no_classes():
            raise ValueError(reason)
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        if self._multi_label and problem != MULTI_LABEL and not self.of_each_class:
            raise ValueError(
                f"the student has several labels an image and the teacher's problem_type is {problem!r}: its outputs "
                "are a distribution over the classes, not a probability of each. Use a teacher of several labels an "
                f"image; if it was trained so, set teacher.config.problem_type = {MULTI_LABEL!r}."
            )
        if problem not in (None, "single_label_classification") and not self._multi_label:
            raise ValueError(
                f"the teacher's problem_type is {problem!r}: its outputs are no distribution over the classes, and "
                "the objectives take a softmax of them. Use a teacher of one class an image, or objectives that "
                "compare no class outputs; if it was trained on one class an image, set "
                "teacher.config.problem_type = 'single_label_classification'."
            )

    def _no_classes(self) -> str:
        """Why it has no class outputs; empty where it has."""
        if self.new_head:
            return missing_head("the teacher", self.new_head)
        if not is_headless(self.model):
            return ""
        return no_classifier("the teacher", self.provenance().architecture, self.provenance().name_or_path)

    def _match_pixels(self, processing_class: Any) -> PixelAdapter | None:
        if self.processing_class is None:
            self.notes.append("the teacher has no image processor: it sees the student's pixels as they are.")
            return None
        if processing_class is None:
            raise ValueError(
                "the teacher has its own image processor and the student's is unknown, so its pixels cannot be "
                "re-normalised. Pass processing_class=<the student's image processor> to the trainer, or "
                "Teacher(model) without a processor if both see the same pixels."
            )
        adapter, note = match_pixels(processing_class, self.processing_class)
        self.notes += [note] if note else []
        return adapter

    def to(self, device: torch.device) -> Teacher:
        """Move to a device. The dtype stays, and a quantised or dispatched model stays where it was put."""
        placed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "quantization_method", None)
        if not placed:
            self.model.to(device)
        return self

    @contextmanager
    def eval_context(self) -> Iterator[None]:
        """The model as it answers: in eval mode. Around every forward of `model`."""
        if self.model.training:
            self.model.eval()
        yield

    def pixels(self, pixel_values: Tensor) -> Tensor:
        """What the teacher is shown for the student's pixel_values (B, C, h, w), in the teacher's dtype."""
        if self._pixels is not None:
            size = self._pixels.output_size(pixel_values)
            if max(size) > max(pixel_values.shape[-2:]):
                logger.warning_once(
                    f"the teacher's images are {size[0]} x {size[1]} and the student's pixels "
                    f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}: they are up-sampled, and the teacher sees "
                    "less than it was trained on."
                )
            pixel_values = self._pixels(pixel_values)
        check_channels(pixel_values, self.model, "the teacher")
        dtype = next(self.model.parameters()).dtype
        return pixel_values.to(dtype) if dtype.is_floating_point else pixel_values

    def geometry(self, pixel_values: Tensor) -> ModelGeometry:
        """What the model gives for images of this size, read once; its classifier in the student's class order."""
        size = tuple(pixel_values.shape[1:])
        if size not in self._geometry:
            with self.eval_context():
                found = describe(self.model, self.pixels(pixel_values), self.pool, self.pooler)
            self._geometry[size] = in_order(found, self.order)
        return self._geometry[size]

    def unserved(self, needs: Needs) -> str:
        """A live model gives everything, but class outputs of a head that it lacks, or that was not in its file."""
        if needs.logits and (reason := self._no_classes()):
            return reason
        if needs.derivative and (reason := not_differentiable(self.model)):
            return reason
        if needs.weights:
            return "the teacher does not hold the student's weights at the start; only the start does."
        return ""

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        """What the model gives for the student's pixel_values (B, C, h, w); logits in the student's class order."""
        if needs.logits:
            self._check_head()
        batch = batch or {}
        rows, places = batch.get("differentiated_rows"), torch.arange(len(pixel_values), device=pixel_values.device)
        if rows is None:
            return self._run(pixel_values, needs, batch, places)
        run = partial(self._run, batch=batch)
        return capture_subset(run, self.model, pixel_values, needs, rows, places=places)

    def _run(self, pixel_values: Tensor, needs: Needs, batch: Batch, places: Tensor) -> Capture:
        if needs.sketches:
            return sketched(self._forward, pixel_values, needs, batch, places, self.teacher_batch)
        if self.teacher_batch is None or needs.derivative or needs.block_calls:
            return self._forward(pixel_values, needs)
        return capture_in_chunks(self._forward, pixel_values, needs, self.teacher_batch)

    def _forward(self, pixel_values: Tensor, needs: Needs) -> Capture:
        return capture(
            self.model,
            pixel_values,
            needs,
            self.geometry(pixel_values) if needs.reads_blocks or needs.pooled else None,
            context=self.eval_context,
            shown=self.pixels,
            classes=self.order,
        )

    def facts(self) -> SourceFacts:
        """Read off the model's modules and weights."""
        return SourceFacts(nonsmooth_layers(self.model), low_precision(self.model), is_sharded(self.model))

    def modules(self) -> list[nn.Module]:
        """The model."""
        return [self.model]

    def classifier(self) -> Any:
        """The model, in eval mode."""
        return self.model

    def provenance(self) -> SourceInfo:
        """Read off the model and its config."""
        return source_info(self.model)

    @property
    def fingerprint(self) -> str:
        """The hash of the weights, which stay as they are: read once, about 1 s a GB."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(self.model)
        return self._fingerprint
