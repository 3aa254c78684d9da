"""Scores of all runs of hf-kdtl distill, after training: the only place that reads the test split."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.experiment import in_words
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.evaluation.predictions import save_predictions
from hf_kdtl.evaluation.records import headline
from hf_kdtl.evaluation.results import update_results
from hf_kdtl.evaluation.saliency import attention_map, input_saliency
from hf_kdtl.evaluation.statistics import paired_difference
from hf_kdtl.models.labels import match_labels
from hf_kdtl.reports.figures.saliency import ATTENTION_SHEET, GRADIENT_SHEET, saliency_figure, unnormalized
from hf_kdtl.reports.figures.samples import SHEET, choose_samples, sample_figure
from hf_kdtl.reports.run_report import SPLITS

IMAGES = 6  # on a sheet of where models look


def evaluate(study: Any) -> None:
    """Score teacher and students, and write student/, the section `evaluation`, the sheet and an example image."""
    datasets = {split: builders.pixels(getattr(study.data, split), study.processor) for split in SPLITS}
    student = runs.load(study.runs()[-1][2])
    measured, models, taught = {"student": (student, datasets["test"])}, {}, {}
    for name, teacher in study.scored.items():
        teacher_data = _teacher_pixels(study, teacher)
        taught[name] = {s: _teacher_logits(study, teacher, student, data) for s, data in teacher_data.items()}
        measured = {in_words(name): (teacher.classifier(), teacher_data["test"])} | measured
    # Of several, agreement with the one is no better than with the other: it is not measured.
    only = next(iter(taught.values())) if len(taught) == 1 else {}
    by_arm, logits = _runs(study, datasets, {split: logits for split, (logits, _) in only.items()})
    seed = best_seed(by_arm["distilled"])
    cost = runs.measure(measured, study.config)
    for name, pairs in taught.items():
        teacher_runs = {"teacher": {split: paired_scores(*pair) for split, pair in pairs.items()}}
        models[in_words(name)] = cost[in_words(name)] | {"runs": teacher_runs}
    models |= {arm: cost["student"] | {"runs": found} for arm, found in by_arm.items()}
    value = {"models": models, "batch_size": study.config.per_device_eval_batch_size, "student_seed": seed}
    if study.config.process_index == 0:
        kept = study.folder / f"distilled-seed{seed}"
        shutil.rmtree(study.folder / "student", ignore_errors=True)
        shutil.copytree(kept / "model", study.folder / "student")
        if only and not study.data.multi_label:  # its bars are probabilities of one class or another
            value["sheet"] = _sheet(study, only["test"][0], logits[seed])
        else:
            _example(study, 0)
        value |= _maps(study, seed, runs.load(kept))
        update_results(study.folder, "evaluation", value)
        update_results(study.folder, "comparison", comparisons(by_arm))


def _runs(
    study: Any, datasets: dict[str, Any], taught: dict[str, np.ndarray]
) -> tuple[dict[str, dict[str, Any]], dict[int, np.ndarray]]:
    """{arm: {seed: {split: scores}}}, and {seed: test logits of the distilled student}.

    The student alone is the baseline of the distilled ones with the same seed.
    """
    by_arm: dict[str, dict[str, Any]] = {arm: {} for arm in study.arms}
    logits: dict[tuple[str, int, str], np.ndarray] = {}
    for arm, seed, folder in study.runs():  # alone comes first
        model, found = runs.load(folder), {}
        for split, data in datasets.items():
            logits[arm, seed, split], labels = runs.predict(model, data, study.config)
            before = logits.get(("alone", seed, split)) if arm != "alone" else None
            found[split] = paired_scores(logits[arm, seed, split], labels, taught.get(split), before)
            if study.config.process_index == 0 and labels.ndim == 1:
                save_predictions(folder, split, logits[arm, seed, split], labels)
        by_arm[arm][str(seed)] = found
    return by_arm, {seed: logits["distilled", seed, "test"] for seed in study.seeds}


def best_seed(runs: dict[str, dict[str, dict[str, float]]]) -> int:
    """The seed whose student is kept and published: the best on validation, never by test; of equals the first.

    Args:
        runs: {seed: {split: scores}} of the distilled student.
    """

    def rank(seed: str) -> tuple[float, float]:
        found = runs[seed]["validation"]
        return found[headline(found)], -found.get("nll", 0.0)

    return int(max(runs, key=rank))


def _teacher_pixels(study: Any, teacher: Any) -> dict[str, Any]:
    """The images as the teacher's own image processor prepares them, if it has one."""
    processor = teacher.processing_class or study.processor
    return {split: builders.pixels(getattr(study.data, split), processor) for split in SPLITS}


def _teacher_logits(study: Any, teacher: Any, student: Any, dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = runs.predict(teacher.classifier(), dataset, study.config)
    order, _ = match_labels(student.config, teacher.provenance())
    return (logits if order is None else logits[:, order]), labels


def comparisons(by_arm: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The section `comparison`: each arm minus each one before it, on every split, paired by seed.

    Args:
        by_arm: {arm: {seed: {split: scores}}}.
    """
    entries = []
    for (b, its), (a, mine) in combinations(by_arm.items(), 2):
        for split in SPLITS:
            metric = headline(next(iter(mine.values()))[split])
            ours, theirs = ([run[split][metric] for run in found.values()] for found in (mine, its))
            found = paired_difference(ours, theirs)
            low, high = found["interval"] or (None, None)
            entry = {"a": a, "b": b, "metric": metric, "split": split, "mean": found["mean"], "low": low, "high": high}
            entries.append(entry | {"seeds": [int(seed) for seed in mine]})
    return entries


def _maps(study: Any, seed: int, student: Any) -> dict[str, str]:
    """Captions of the sheets of where teacher and student look and of what moves them, on test images of
    different classes."""
    before = study.trainer("distilled", seed, study.folder).model
    data = builders.pixels(study.data.test, study.processor)
    of_classes = study.data.test["label"][:]
    chosen = spread(of_classes, IMAGES)
    pixels = builders.batch_of(data, chosen)
    labels = torch.tensor([of_classes[row] for row in chosen])
    images = unnormalized(pixels, study.processor)
    students, captions = {"student before": before, "student after": student}, {}
    whole = {name: one for name, one in study.teachers.items() if not one.facts().sharded}  # here runs one process
    try:
        seen = {
            in_words(name): attention_map(one.classifier(), one.pixels(pixels.to(one.classifier().device)))
            for name, one in whole.items()
        }
        seen |= {name: attention_map(model, pixels.to(model.device)) for name, model in students.items()}
        about = "Where the last block looks"
        captions["attention"] = saliency_figure(study.folder / ATTENTION_SHEET, images, seen, about)
    except ValueError as error:  # a model without any map; the run must not end for want of a picture
        runs.say(study.config, f"no attention sheet: {error}")
    moved = {}
    scored = {} if study.data.multi_label else {name: one for name, one in study.scored.items() if name in whole}
    for name, teacher in scored.items():  # in its own order of classes
        order, _ = match_labels(student.config, teacher.provenance())
        its, model = labels if order is None else torch.tensor(order)[labels], teacher.classifier()
        moved[in_words(name)] = input_saliency(model, pixels.to(model.device), its, teacher.pixels)
    labelled = {} if study.data.multi_label else students
    moved |= {name: input_saliency(model, pixels.to(model.device), labels) for name, model in labelled.items()}
    if study.data.multi_label:
        return captions  # the pixels of which class?
    about = "Which pixels move the log-probability of the image's class"
    return captions | {"gradients": saliency_figure(study.folder / GRADIENT_SHEET, images, moved, about)}


def spread(labels: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """Images of as many classes as possible: drawn by seed, one of each class, then a second of each, ..."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    seen: Counter[int] = Counter()
    turns = []
    for place, row in enumerate(order):
        turns.append((seen[labels[row]], place, row))
        seen[labels[row]] += 1
    return [row for _, _, row in sorted(turns)[:count]]


def _sheet(study: Any, teacher: np.ndarray, student: np.ndarray) -> str:
    rows = choose_samples(teacher, student)
    test = study.data.test[rows]
    images = [decode_row(cell, i, len(study.data.test)) for cell, i in zip(test["image"], rows, strict=True)]
    _example(study, rows[-1])
    its, own = (torch.tensor(logits[rows]).float().softmax(-1).numpy() for logits in (teacher, student))
    return sample_figure(study.folder / SHEET, images, test["label"], study.data.label_names, its, own)


def _example(study: Any, row: int) -> None:
    """An image for the command that is printed at the end."""
    test = study.data.test
    decode_row(test[row]["image"], row, len(test)).save(study.folder / "example.png")
