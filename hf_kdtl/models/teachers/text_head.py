"""A teacher whose classes are texts: CLIP and SigLIP need class names in place of a trained head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModel, AutoTokenizer

from hf_kdtl.models.labels import class_names
from hf_kdtl.models.teachers.file_names import describe_missing
from hf_kdtl.models.teachers.processor_files import open_processor
from hf_kdtl.models.teachers.resolve import Loaded, locate, open_config, open_with, untrusted
from hf_kdtl.models.teachers.source import SourceInfo
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.models.text_classifier import TOWERS, TextHeadClassifier, checked_templates, text_embeddings


class TextHeadTeacher(Teacher):
    """A model of images and texts (CLIP, MetaCLIP 2, SigLIP, SigLIP 2 of a fixed size) as an image classifier.

    z_k = exp(logit_scale) <i, t_k> (+ logit_bias), i the normalised embedding of the image, t_k the normalised mean
    over the templates of the normalised embeddings of the texts of class k. For one template these are the model's
    own `logits_per_image`. The text tower runs once and is freed. SigLIP was trained with a sigmoid for each pair of
    image and text; the soft-max over the class names, which objectives on class outputs take, is ours; a student with
    several labels an image takes the sigmoid.

    Args:
        model: of images and texts, as AutoModel opens it.
        tokenizer: of its texts.
        processing_class: its image processor.
        class_names: one text a class; an underscore is read as a blank. None: the student's, which it has of its
            data; `match` then takes them.
        templates: texts with {} for the class name.

    Cost: the text tower once for each class and template; then a forward of the vision tower a step.

    Raises:
        ValueError: for a template without {}, a model of another kind, names that are not distinct, or a text that
            is longer than the model takes.

    Example:
        >>> teacher = Teacher.from_pretrained("openai/clip-vit-base-patch32", class_names=["cat", "dog"],
        ...                                   templates=["a photo of a {}", "a drawing of a {}"])  # doctest: +SKIP
    """

    of_each_class = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processing_class: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | str | None = None,
    ):
        check_tower(model.config, "the teacher")
        self.templates = checked_templates(templates)
        self._texts: tuple[Any, Any] | None = (model, tokenizer)
        super().__init__(_Unnamed(model.config), processing_class)
        if class_names is not None:
            self.name_classes(class_names)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | str | None = None,
        **model_options: Any,
    ) -> TextHeadTeacher:
        """A folder or Hub name with both towers, a tokenizer and an image processor.

        Raises:
            OSError: when nothing is there, it cannot be read, or has no tokenizer.
            ValueError: as the class, and for a file without the weights of both towers.
        """
        checked_templates(templates)
        who = f"the teacher {str(path)!r}"
        check_tower(open_config(path, role="the teacher"), who)
        loaded, tokenizer = _open(path, who, model_options), _tokenizer(path, who)
        processor = open_processor(path, role="the teacher", **model_options)
        teacher = cls(loaded.model, tokenizer, processor, class_names=class_names, templates=templates)
        teacher.unread, teacher.notes = loaded.unread, [*loaded.unread]
        return teacher

    @property
    def named(self) -> bool:
        """Whether it has its class names."""
        return self._texts is None

    def name_classes(self, names: Sequence[str]) -> None:
        """Take the class names: run the text tower, and free it.

        Raises:
            ValueError: when it has them, they are not distinct, or one is too long a text.
        """
        if self._texts is None:
            raise ValueError("the teacher has its class names, and its text tower is freed; open it again.")
        if len(set(names)) < len(names) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"class_names are {list(names)}; expected a text for each class, all different.")
        model, tokenizer = self._texts
        texts = text_embeddings(model, tokenizer, names, self.templates)
        head = TextHeadClassifier(model, names, texts).eval().requires_grad_(False)
        self._texts = None
        self._hold(head, self.processing_class)

    def match(self, student: nn.Module, processing_class: Any, compare_classes: bool | Collection[str]) -> None:
        """As a Teacher's; without class names it takes the student's.

        Raises:
            ValueError: also when neither has any.
        """
        if not self.named:
            config: Any = student.config
            names = class_names(config)
            if names is None:
                raise ValueError(
                    "the teacher's classes are texts, and neither it nor the student has class names. Give them: "
                    'Teacher.from_pretrained(path, class_names=["cat", "dog"]), --class_names cat dog.'
                )
            self.name_classes(names)
        super().match(student, processing_class, compare_classes)
        shown = " | ".join(self.templates[:3]) + (" | ..." if len(self.templates) > 3 else "")
        self.notes.append(f"the teacher's classes are texts, made of the class names by: {shown}")

    def provenance(self) -> SourceInfo:
        """Of the model of images and texts, with the vision tower's parameters."""
        return replace(super().provenance(), architecture=self.model.architecture)


class _Unnamed(nn.Module):
    """In place of the classifier until the class names are known."""

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.architecture = config, "a text head without class names"


def check_tower(config: Any, who: str) -> None:
    """Raises ValueError for a config that is not of a model of images and texts that is known."""
    kind = str(getattr(config, "model_type", ""))
    if kind in TOWERS:
        return
    why = "it reads flat patches of any size; take a SigLIP 2 of a fixed size, such as google/siglip2-base-patch16-224"
    if kind != "siglip2":
        alone = kind.endswith("_vision_model")
        why = "the vision tower alone, save both" if alone else "class_names and templates need a text tower"
    raise ValueError(
        f"{who} is of type {kind!r}: {why}. Expected CLIP, MetaCLIP 2 or SigLIP ({', '.join(TOWERS)}); an image "
        "classifier has classes of its own, so leave class_names and templates out."
    )


def open_text_head(path: str | Path, options: dict[str, Any]) -> TextHeadTeacher | None:
    """A model of images and texts, where the options name classes or templates."""
    named = {"class_names", "templates"} & options.keys()
    return TextHeadTeacher.from_pretrained(path, **options) if named else None


def has_text_tower(config: Any) -> bool:
    """Whether a config is of a model that class names make a classifier of, and not of a trained classifier."""
    names = getattr(config, "architectures", None) or []
    return getattr(config, "model_type", "") in TOWERS and not any("ForImageClassification" in name for name in names)


def _open(path: str | Path, who: str, options: dict[str, Any]) -> Loaded:
    loaded = open_with(AutoModel, path, role="the teacher", **options)
    if loaded.lacking:
        raise ValueError(
            f"{who} lacks {len(loaded.lacking)} weights of {type(loaded.model).__name__}, which would be random: "
            f"{describe_missing(loaded.lacking, loaded.mismatched)}. Expected a file with both towers: save the model "
            "again with model.save_pretrained(folder)."
        )
    return loaded


def _tokenizer(path: str | Path, who: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(locate(path, "the teacher"), **untrusted({}))
    except Exception as error:  # a missing or broken file raises whatever its content leads to
        raise OSError(
            f"{who} has no tokenizer that can be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}), "
            "and its classes are texts. Save it with the model: tokenizer.save_pretrained(folder)."
        ) from error
