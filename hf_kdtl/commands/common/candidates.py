"""Several models on the images of one split: opened, matched with the data, measured. For hf-kdtl evaluate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.folders import folder_of
from hf_kdtl.commands.common.speed import speeds
from hf_kdtl.commands.common.timing import words
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.degradations import DEGRADATIONS
from hf_kdtl.data.degraded import degraded
from hf_kdtl.data.loading import ImageData
from hf_kdtl.evaluation import records
from hf_kdtl.evaluation.cost import cost
from hf_kdtl.evaluation.fidelity import fidelity
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.evaluation.scoring import correct, diagnostics
from hf_kdtl.evaluation.statistics import images_difference
from hf_kdtl.models import Teacher
from hf_kdtl.models.labels import class_names, is_multi_label, label_order
from hf_kdtl.models.teachers.resolve import open_classifier, open_config
from hf_kdtl.models.teachers.text_head import TextHeadTeacher, has_text_tower
from hf_kdtl.reports.evaluation_sections import figure_name
from hf_kdtl.reports.evaluation_values import REFERENCES
from hf_kdtl.reports.figures.samples import choose_samples, sample_figure


@dataclass
class Candidate:
    """A model to be judged, and how it sees the data and answers in its classes.

    Args:
        name: "student" (or, of several, "student" and what tells its folder from the others), "teacher", "baseline".
        order: the columns of its logits in the data's order of classes.
    """

    name: str
    role: str
    path: str
    model: Any
    processor: Any
    order: list[int]

    def answers(self, dataset: Any, config: DistillationConfig) -> tuple[np.ndarray, np.ndarray]:
        """(logits (n, K), labels (n,)) in the data's order of classes."""
        logits, labels = runs.predict(self.model, dataset, config)
        return logits[:, self.order], labels


def open_candidates(
    students: Sequence[str],
    references: dict[str, str | None],
    data: ImageData,
    notes: list[str],
    templates: Sequence[str] | None = None,
) -> list[Candidate]:
    """The students in the order in which they were typed, then the teacher and the baseline ({role: path or None}).

    A teacher of images and texts has the data's classes, as texts made by the templates.

    Raises:
        ValueError, OSError: when one cannot be opened, or has other classes than the data.
    """
    given = [("student", name, path) for name, path in zip(student_names(students), students, strict=True)]
    given += [(role, role, path) for role, path in references.items() if path is not None]
    return [_open(role, name, path, data, notes, templates) for role, name, path in given]


def student_names(paths: Sequence[str]) -> list[str]:
    """ "student", or of several "student " and as much of the end of each path as tells them apart."""
    if len(paths) == 1:
        return ["student"]
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-count:]) for part in parts]
        if len(set(ends)) == len(ends):
            return [f"student {end}" for end in ends]
    raise ValueError(f"models are {', '.join(paths)}; expected different ones.")


def _open(
    role: str, name: str, path: str, data: ImageData, notes: list[str], templates: Sequence[str] | None = None
) -> Candidate:
    by_text = role == "teacher" and bool(templates or has_text_tower(open_config(path, role=name)))
    if by_text:
        teacher = TextHeadTeacher.from_pretrained(path, class_names=data.label_names, templates=templates)
        model, unread = teacher.classifier(), teacher.unread
    else:
        opened = open_classifier(path, role=name)
        model, unread = opened.model.eval(), opened.unread
    notes += unread
    several = is_multi_label(model)
    if several and not data.multi_label:
        raise ValueError(f"{name} ({path}) has several labels an image, and the data one: type --multi_label true.")
    if data.multi_label and not several and not by_text:
        raise ValueError(
            f"{name} ({path}) answers with one class an image, and the data has several labels. Leave --multi_label "
            "out, or name a model that was trained on several."
        )
    unnamed = class_names(model.config) is None
    try:
        data.in_order(model)  # checks the classes, and names those of a model that does not
    except ValueError as error:
        raise ValueError(f"{name} ({path}): {error}") from error
    own = class_names(model.config)
    assert own is not None
    if unnamed:
        notes.append(f"{name} does not name its classes: they are taken to be those of the data, in order.")
    elif label_order(data.label_names, own, ("data", "model")) is not None:
        notes.append(f"{name} lists its classes in another order: its answers are re-ordered, by name.")
    order = label_order(data.label_names, own, ("data", "model")) or list(range(len(own)))
    return Candidate(name, role, path, model, builders.processor_of(path, model, notes), order)


class Evaluation:
    """All models on the images of one split; `number` of them for what takes long."""

    def __init__(
        self,
        candidates: list[Candidate],
        data: ImageData,
        split: str,
        number: int,
        config: DistillationConfig,
        forms: Sequence[str] = (),
    ):
        self.forms = forms
        self.candidates, self.config, self.names, self.split_name = candidates, config, data.label_names, split
        self.split = getattr(data, split)
        self.rows = some_of(self.split, number)
        self.datasets = {one.name: builders.pixels(self.split, one.processor) for one in candidates}
        self.references = {one.role: one for one in candidates if one.role in REFERENCES}

    def time_needed(self, degradations: Sequence[str], severities: Sequence[int]) -> str:
        """An estimate of how long it takes, from one batch of each model."""
        size, passes = (
            min(self.config.per_device_eval_batch_size, len(self.split)),
            len(degradations) * len(severities),
        )
        once = degraded_pass = 0.0
        for one in self.candidates:
            begun = time.perf_counter()
            pixels = builders.batch_of(self.datasets[one.name], range(size))
            with torch.no_grad():
                one.model(pixel_values=pixels.to(one.model.device, one.model.dtype))
            an_image = (time.perf_counter() - begun) / size / self.config.world_size
            once += an_image * (len(self.split) + 6 * len(self.rows)) + 10
            degraded_pass += 1.5 * an_image * passes * len(self.rows)
        shorter = f"; with --degradations none about {words(once)}" if passes else ""
        return f"This takes about {words(once + degraded_pass)}{shorter}."

    def section(self, degradations: Sequence[str], severities: Sequence[int]) -> dict[str, Any]:
        """The section `evaluation` of results.json."""
        logits = {}
        for one in self.candidates:
            logits[one.name], labels = one.answers(self.datasets[one.name], self.config)
        models = self._scores(logits, labels)
        value = {
            "split": self.split_name,
            "images": len(labels),
            "batch_size": self.config.per_device_eval_batch_size,
            "degradations_left_out": [name for name in DEGRADATIONS if name not in degradations],
            "models": models,
        }
        if self.config.process_index == 0:
            batches = self._batches()
            for name, found in cost(batches).items():
                models[name] |= found
            if self.forms:
                value["speed"] = speeds(batches, self.forms)
        if "teacher" in self.references and self.config.process_index == 0:
            students = [one for one in self.candidates if one.role == "student"]
            value["fidelity"] = {one.name: self._fidelity(one) for one in students}
            value["disagreement"] = {one.name: self._sheet(one.name, logits, value) for one in students}
        if degradations:
            value["degraded"] = self._degraded(degradations, severities, models)
        return value

    def _scores(self, logits: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, Any]]:
        models = {}
        for one in self.candidates:
            others = {role: logits[role] for role in self.references if role != one.role}
            found = paired_scores(logits[one.name], labels, **others)
            models[one.name] = {
                "role": one.role,
                "path": one.path,
                "runs": {one.name: {self.split_name: found}},
                **diagnostics(logits[one.name], labels, self.names),
                "differences": {
                    role: images_difference(correct(logits[one.name], labels), correct(its, labels))
                    for role, its in others.items()
                },
            }
        return models

    def _batches(self) -> dict[str, tuple[Any, torch.Tensor]]:
        """{name: (model, a batch of its pixels)}."""
        size, device, models = self.config.per_device_eval_batch_size, self.config.device, {}
        for one in self.candidates:
            pixels = builders.batch_of(self.datasets[one.name], (i % len(self.split) for i in range(size)))
            models[one.name] = one.model.to(device), pixels.to(device, one.model.dtype)
        return models

    def _fidelity(self, student: Candidate) -> dict[str, Any]:
        taught, size = self.references["teacher"], self.config.per_device_eval_batch_size
        images = builders.pixels(self.rows, student.processor)
        indices = np.split(np.arange(len(images)), range(size, len(images), size))
        batches = (
            builders.batch_of(images, rows.tolist())
            for rows in tqdm(indices, desc="Like the teacher", leave=False, delay=2, disable=None)
        )
        teacher = Teacher(taught.model, taught.processor)
        return fidelity(student.model.to(self.config.device), teacher, batches, student.processor)

    def _sheet(self, student: str, logits: dict[str, np.ndarray], value: dict[str, Any]) -> str:
        rows = choose_samples(logits["teacher"], logits[student])
        found = self.split[rows]
        images = [decode_row(cell, i, len(self.split)) for cell, i in zip(found["image"], rows, strict=True)]
        its, own = (torch.tensor(logits[name][rows]).float().softmax(-1).numpy() for name in ("teacher", student))
        folder_of(self.config).mkdir(parents=True, exist_ok=True)
        name = figure_name(records.Evaluation.of(value, "evaluation"), student, "disagreement")
        path = folder_of(self.config) / name
        return sample_figure(path, images, found["label"], self.names, its, own)

    def _degraded(
        self, names: Sequence[str], severities: Sequence[int], models: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Accuracy of every model under every degradation, into `models`; returns what they have in common."""
        side = max(min(dataset[0]["pixel_values"].shape[-2:]) for dataset in self.datasets.values())
        total = len(self.candidates) * (1 + len(names) * len(severities))
        hidden = self.config.disable_tqdm or self.config.process_index > 0 or None  # None: not without a terminal
        with tqdm(total=total, desc="Degraded images", leave=False, disable=hidden) as bar:
            for one in self.candidates:

                def accuracy(dataset: Any, one: Candidate = one) -> float:
                    bar.update()
                    return float(correct(*one.answers(dataset, self.config)).mean())

                clean = accuracy(builders.pixels(self.rows, one.processor))
                models[one.name]["degraded"] = {"clean": clean} | {
                    name: [accuracy(degraded(self.rows, one.processor, name, s, side)) for s in severities]
                    for name in names
                }
        return {"images": len(self.rows), "severities": list(severities), "side": side}


def some_of(split: Any, number: int) -> Any:
    """That many images of a split, always the same ones, in their order; all where there are no more.

    Drawn, because a folder's images are sorted by class.
    """
    if number >= len(split):
        return split
    rows = np.random.default_rng(0).choice(len(split), number, replace=False)
    return split.select(np.sort(rows))
