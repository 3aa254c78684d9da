"""Which training images keep their labels, and which are trained on without one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from sklearn.model_selection import train_test_split

from hf_kdtl.data.columns import UNLABELLED
from hf_kdtl.data.labelled_share import LabelledShareSampler, labelled_per_batch
from hf_kdtl.data.loading import ImageData, strata
from hf_kdtl.data.unlabelled import by_label, open_unlabelled, without_labels

REST, SHARE = "rest", 0.25


@dataclass
class UnlabelledOptions:
    """Images without labels: an objective that compares with the teacher learns from them too."""

    unlabelled: str | None = field(
        default=None,
        metadata={
            "help": "Images without labels: a folder, parquet; or rest: those that --labels_per_class left out."
        },
    )
    labelled_share: float | None = field(
        default=None,
        metadata={"help": f"Of each batch, with unlabelled images; by default their share of all, at least {SHARE}."},
    )


def fewer_labels(data: ImageData, images: int | None, per_class: int | None, seed: int) -> ImageData:
    """The data with that many labelled training images, in all or of each class; the others are its `rest`.

    Images that have no label stay in train.

    Raises:
        ValueError: for both numbers, or one that is out of range.
    """
    if images is not None and per_class is not None:
        raise ValueError("found train_images and labels_per_class; expected one of them.")
    if per_class is not None and data.multi_label:
        raise ValueError("labels_per_class counts one label an image, and the data has several; use train_images.")
    labels = np.array(data.train["label"][:])
    if images is not None and images != len(labels):
        rows, message = _stratified(labels, images, data, seed)
    elif per_class is not None:
        rows, message = _each_class(labels, per_class, data.label_names, seed)
    else:
        return data
    rest = np.setdiff1d(np.arange(len(labels)), rows)
    left = without_labels(data.train.select(rest), data.label_names, data.multi_label) if len(rest) else None
    return replace(data, train=data.train.select(np.sort(rows)), rest=left, notes=[*data.notes, message])


def _stratified(labels: np.ndarray, number: int, data: ImageData, seed: int) -> tuple[np.ndarray, str]:
    total, counts = len(labels), np.unique(labels, return_counts=True)[1]
    by = strata(labels, number) if data.multi_label else labels
    least = len(data.label_names) if by is None else len(counts)
    most = total - (1 if by is None else least)
    if not least <= number <= most:
        raise ValueError(
            f"train_images is {number}, expected {least} to {most}, so that each class keeps its share, or {total} "
            "(all of train)."
        )
    if by is not None and counts.min() < 2:
        raise ValueError(
            f"train_images is {number} and a class has one image in train, of which it cannot keep a share. Add "
            "images, or type --labels_per_class instead."
        )
    rows, _ = train_test_split(np.arange(total), train_size=number, stratify=by, random_state=seed)
    how = "at random" if by is None else "stratified by class"
    return rows, f"{number} of {total} images of train are used, {how}, seed {seed}."


def _each_class(labels: np.ndarray, number: int, names: list[str], seed: int) -> tuple[np.ndarray, str]:
    if number < 1:
        raise ValueError(f"labels_per_class is {number}, expected 1 or more.")
    draw, known = np.random.default_rng(seed), labels != UNLABELLED
    of_class = [draw.permutation(np.flatnonzero(labels == index)) for index in range(len(names))]
    rows = np.concatenate([own[:number] for own in of_class])
    short = [f"{name} {len(own)}" for name, own in zip(names, of_class, strict=True) if len(own) < number]
    fewer = f" Fewer of {', '.join(short[:8])}{', ...' if len(short) > 8 else ''}." if short else ""
    message = f"{len(rows)} of {known.sum()} labelled images of train are used: {number} of each class, seed {seed}."
    return np.concatenate([rows, np.flatnonzero(~known)]), message + fewer


@dataclass
class TrainingImages:
    """The training split of a run, and the share of labelled images in its batches (None: by chance)."""

    labelled: Dataset
    unlabelled: Dataset | None = None
    share: float | None = None
    source: str | None = None

    @property
    def all(self) -> Dataset:
        return self.labelled if self.unlabelled is None else concatenate_datasets([self.labelled, self.unlabelled])

    def batches(self, size: int) -> int:
        """Batches of an epoch."""
        if self.unlabelled is None or self.share is None:
            return -(-len(self.labelled) // size)
        return LabelledShareSampler(np.array(self.all["label"][:]) >= 0, size, self.share, 0, lambda: 0).batches

    def facts(self, batch_size: int) -> dict[str, Any]:
        """For the section `data` of results.json; nothing where every image has a label."""
        if self.unlabelled is None or self.share is None:
            return {}
        number = labelled_per_batch(self.share, batch_size)
        return {
            "unlabelled": {
                "source": self.source,
                "labelled_images": len(self.labelled),
                "unlabelled_images": len(self.unlabelled),
                "labelled_per_batch": number,
                "unlabelled_per_batch": batch_size - number,
            }
        }

    def note(self, batch_size: int) -> list[str]:
        """How many of each are in a batch, in a sentence."""
        if self.unlabelled is None or self.share is None:
            return []
        number = labelled_per_batch(self.share, batch_size)
        return [
            f"{len(self.labelled)} labelled and {len(self.unlabelled)} unlabelled training images; every batch of "
            f"{batch_size} has {number} labelled and {batch_size - number} unlabelled ones."
        ]


def training_images(
    data: ImageData, options: UnlabelledOptions, data_options: Any, notes: list[str]
) -> TrainingImages:
    """The labelled and the unlabelled training images: those of --unlabelled, and those of train without a label.

    Raises:
        ValueError: where `rest` is asked for and nothing was left out, or `labelled_share` and no image is unlabelled.
    """
    labelled, found = by_label(data.train)
    parts = [found] if len(found) else []
    if options.unlabelled == REST:
        if data.rest is None:
            raise ValueError(
                "unlabelled is 'rest' and no training image is left out; add --labels_per_class <number>, or name a "
                "folder of images (./rest for one of that name)."
            )
        parts.append(data.rest)
        notes.append(f"{len(data.rest)} images of train are used without their labels (--unlabelled rest).")
    elif options.unlabelled is not None:
        parts.append(
            open_unlabelled(
                options.unlabelled,
                data,
                image_column=data_options.image_column,
                on_bad_image=data_options.on_bad_image,
                notes=notes,
            )
        )
    if not parts:
        if options.labelled_share is not None:
            raise ValueError("labelled_share is set and every training image has a label; add --unlabelled <folder>.")
        return TrainingImages(labelled)
    unlabelled = concatenate_datasets(parts)
    natural = len(labelled) / (len(labelled) + len(unlabelled))
    share = max(SHARE, natural) if options.labelled_share is None else options.labelled_share
    labelled_per_batch(share, 2)  # an impossible share is refused before the images are read
    return TrainingImages(labelled, unlabelled, share, options.unlabelled)
