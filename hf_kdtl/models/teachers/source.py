"""Where the signals of a teacher come from: what the trainer asks of a live model, a store, or several of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn

from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import ModelGeometry

ItemCheck = Callable[[int, Any], None]
"""Raises ValueError for (the row of the source split, the item) that the signals are not of."""


class Batch(TypedDict, total=False):
    """What is known of the images of a micro-batch, in addition to their pixels."""

    labels: Tensor  # (B,) class indices, -100 unlabelled; or (B, K) distributions
    draws: Draws  # randomness that does not depend on how the batch was split
    image_index: Tensor  # (B,) int64 rows of the source split as loaded; only where a source has `needs_index`
    image_view: Tensor  # (B,) int64 views of these images; absent where the data does not know them
    teacher_pixel_values: Tensor  # (B, C, H, W) the same in the teacher's format; with teacher_pixels own
    view_draws: Draws  # randomness of each image's view, the same at every step; of sketches
    differentiated_rows: Tensor  # (b,) the images that derivatives are taken of; absent: all of them


def called(name: str) -> str:
    """What messages call a source.

    >>> called("teacher"), called("a")
    ('the teacher', "the teacher 'a'")
    """
    return f"the {name}" if name in ("teacher", "start") else f"the teacher {name!r}"


class SourceFacts(NamedTuple):
    """What decides which derivatives of a source are exact.

    Args:
        nonsmooth_layers: types of its layers with kinks, as text; empty for a smooth function.
        low_precision: how its weights are rounded, in a word; empty for 32 bits and more.
        sharded: its weights are spread over processes (FSDP2).
    """

    nonsmooth_layers: str = ""
    low_precision: str = ""
    sharded: bool = False


@dataclass(frozen=True)
class SourceInfo:
    """Which model the signals are of, as plain data for the card and for files that belong to one teacher.

    Args:
        name_or_path, revision: what it was loaded from; empty and None where unknown.
        architecture, model_type: of the model without adapters.
        num_labels, class_names: in its own order; None for unnamed classes.
        parameters, trainable: their numbers.
        image_size: of its config, in pixels.
        adapters: {name: kind} of its adapters; None without any.
        is_student: whether it is the student itself with its adapters off.
        license: where it was recorded with the signals; else it is read from the model's card.
    """

    architecture: str
    name_or_path: str = ""
    revision: str | None = None
    model_type: str = ""
    num_labels: int = 0
    class_names: list[str] | None = None
    parameters: int = 0
    trainable: int = 0
    image_size: Any = None
    adapters: dict[str, str] | None = None
    is_student: bool = False
    license: str | None = None

    @property
    def id2label(self) -> dict[int, str] | None:
        """The class names as a config of transformers has them, for `match_labels`."""
        return None if self.class_names is None else dict(enumerate(self.class_names))


class SignalSource(Protocol):
    """One source of teacher signals. Subclass it: what is not implemented here must be, the rest has defaults.

    A new kind of teacher is a subclass in one file, and a line in `hf_kdtl.models.teachers.as_source` for what a user
    types to get it.
    """

    notes: list[str]
    """What `match` decided, for the user."""
    processing_class: Any = None
    """Its image processor, where known."""
    needs_index: bool = False
    """Whether `capture` needs `batch["image_index"]` and `["image_view"]`: the training data is then made to carry
    them."""
    answers_without_index: bool = False
    """Whether it also serves images that are not of the training data, such as an evaluation's."""
    order: list[int] | None = None
    """The source's class for each of the student's, by index; None where they are the same, or not compared."""

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        """Learn the student's pixel format, and its class order where class outputs are compared. Called again when
        the student changes.

        Args:
            compare_classes: whether they are; of a source with several `members` the names of those whose are.

        Raises:
            ValueError: when pixels or classes cannot be matched, saying what to type.
        """

    def check_data(self, data: Any) -> None:
        """Learn the training data, before training; it may learn how many views there are.

        Raises:
            ValueError: when the signals are of other images or views, saying what to type.
        """
        return None

    def item_checks(self) -> list[ItemCheck]:
        """After `check_data`: what each training item is shown to where it is read, before it is used."""
        return []

    def keep(self) -> None:
        """A checkpoint is about to be written: put on the disk what a run that is continued from it will not meet."""
        return None

    def unserved(self, needs: Needs) -> str:
        """Why these needs cannot be served, as a sentence that says what to type; empty where they can. Asked for each
        objective, whose key is put before it, and for layer_rates, before training."""
        return ""

    def geometry(self, pixel_values: Tensor) -> ModelGeometry:
        """What the source gives, block by block, for images of this size; its classifier in the student's order.

        Raises:
            ValueError: when its blocks are not known.
        """
        raise ValueError(
            f"the blocks of {type(self).__name__} are not known. Use objectives on class outputs, such as logit_kd."
        )

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Batch | None = None) -> Capture:
        """The signals for the student's pixel_values (B, C, h, w); class outputs in the student's order.

        Args:
            needs: what to capture; only what `unserved` accepts.
            batch: what else is known of these images.
        """
        raise NotImplementedError

    def pixels(self, pixel_values: Tensor) -> Tensor:
        """The pixels that the source sees for the student's."""
        return pixel_values

    def provenance(self) -> SourceInfo:
        """Which model the signals are of."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """The hash of that model's weights (`hf_kdtl.models.fingerprint`)."""
        raise NotImplementedError

    def facts(self) -> SourceFacts:
        """What decides which derivatives are exact."""
        return SourceFacts()

    def members(self) -> Mapping[str, SignalSource]:
        """{name: source} that objectives may take their signals from, by their `source`."""
        return {"teacher": self}

    def modules(self) -> list[nn.Module]:
        """The live modules that FSDP2 must shard; none where nothing is live or the student's own weights answer."""
        return []

    def classifier(self) -> Any:
        """The live image classifier, for evaluation as a model of its own (scores, cost, maps); None without one."""
        return None

    def eval_context(self) -> AbstractContextManager[None]:
        """A context in which the source answers the same also inside torch.func transforms."""
        return nullcontext()

    def to(self, device: torch.device) -> SignalSource:
        """Move to a device."""
        return self
