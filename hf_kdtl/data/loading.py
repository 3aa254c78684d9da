"""Images and labels from wherever they are, as three splits, and as what Trainer feeds a model."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset, Value
from tqdm.auto import tqdm

from hf_kdtl.data.bit_depth import CHOICES, check_bit_depths
from hf_kdtl.data.columns import UNLABELLED, refuse_unseen, with_two_columns
from hf_kdtl.data.decoding import decode_row, missing_reader
from hf_kdtl.data.duplicates import check_duplicates, check_paths
from hf_kdtl.data.several import SEVERAL
from hf_kdtl.data.sources import Source, open_source, source_name
from hf_kdtl.models.labels import class_names, label_order, same_classes, set_class_names
from hf_kdtl.utils.text import some


@dataclass
class ImageData:
    """Three splits of the columns `image` (`datasets.Image(decode=False)`), `label` (`ClassLabel`) and `row` (int64):
    the place of the image in the split as it was loaded, which it keeps in every selection. Augmentation and stored
    teacher outputs go by it.

    Attributes:
        train, validation, test: label i is label_names[i] in all three; -100 in train is an unlabelled image.
        label_names: the names of the classes, in the order of train.
        notes: sentences about what was decided for the user: splits made, images left out, classes re-ordered, ...
        source: what was loaded.
        high_bit_depth: what was done to images of more than 8 bits, "clip" or "scale".
        rest: training images that were left out to train on fewer labels, each with the label -100.
        train_rows: the number of images of train as it was loaded.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    label_names: list[str]
    notes: list[str]
    source: str
    high_bit_depth: str = "clip"
    rest: Dataset | None = None
    train_rows: int = 0

    @property
    def multi_label(self) -> bool:
        """Whether an image has several labels, in the column `labels`."""
        return SEVERAL in self.train.features

    def check_readable(self) -> None:
        """Decode every image once. Raises ValueError naming the first that cannot be read."""
        for name in ("train", "validation", "test"):
            split = getattr(self, name)
            bar = tqdm(split["image"], desc=f"Reading {name}", leave=False, delay=2, disable=None)
            for index, image in enumerate(bar):
                decode_row(image, index, len(split))

    def in_order(self, model: Any) -> ImageData:
        """The same data with its classes in the order of a model that has them, by name; reported in the notes.

        A model without class names takes the order of the data: its config is given the names.

        Raises:
            ValueError: when the classes differ.
        """
        names = class_names(model.config)
        if names is None and model.config.num_labels == len(self.label_names):
            set_class_names(model.config, self.label_names)
            return self
        if names is None or not same_classes(names, self.label_names):
            has = f"{model.config.num_labels} unnamed" if names is None else some(names)
            raise ValueError(
                f"the data has the classes {some(self.label_names)} and the model {has}. Give the model the classes "
                "of the data: from_pretrained(..., num_labels=<their number>, ignore_mismatched_sizes=True)."
            )
        place = label_order(self.label_names, names, ("data", "model"))
        if place is None:
            return self

        order = list(place)  # of the data's class i in the model

        def reordered(split: Dataset) -> Dataset:
            labels = [place[label] if label >= 0 else label for label in split["label"][:]]
            feature = type(split.features["label"])(names=names)
            several = split[SEVERAL][:] if SEVERAL in split.features else None
            split = split.remove_columns("label").add_column("label", labels, feature=feature)
            if several is None:
                return split
            rows = [[row[order.index(k)] for k in range(len(row))] for row in several]
            return split.remove_columns(SEVERAL).add_column(SEVERAL, rows, feature=datasets.List(Value("int64")))

        message = "The data lists its classes in another order than the model: its labels are re-ordered, by name."
        splits = {name: reordered(getattr(self, name)) for name in ("train", "validation", "test")}
        splits |= {} if self.rest is None else {"rest": reordered(self.rest)}
        return replace(self, **splits, label_names=names, notes=[*self.notes, message])


def load_images(
    source: Source = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 42,
    on_bad_image: Literal["error", "skip"] = "error",
    high_bit_depth: Literal["clip", "scale"] = "clip",
    multi_label: bool = False,
) -> ImageData:
    """Load images with labels, and make the splits that are missing.

    Args:
        source: one of

            - "digits": the 1797 handwritten digits that scikit-learn carries, 8 x 8, even if a folder of that name is
              here ("./digits");
            - a folder of images: a sub-folder for each class; or train, validation and test folders of these (also
              val, valid, dev, ...; also one level down). `unlabelled` is no class: its images train without a label.
              A metadata.csv or .jsonl (file_name, label) names the classes where the folders do not;
            - a glob of class folders, such as "photos/*/*", where the folders can be read in more than one way;
            - a csv, tsv or jsonl file of paths (file_name, path, ...) and labels;
            - a parquet file, a folder or a glob of parquet files, or of WebDataset archives (.tar): a name that begins
              with train, validation, valid, val, dev or test goes to that split;
            - a dataset written by save_to_disk, a `datasets.Dataset` or `DatasetDict`;
            - or else the name of a dataset on the Hub.

            Where it has no splits, a column called split with names of splits (train, val, ...) divides it. A label
            is the text that stands in its cell (01 is not 1), or an integer where all are; an empty one, or -100, is
            no label.
        image_column, label_column: needed where there is not exactly one candidate. By default the column whose
            feature is an Image, and the one that is a ClassLabel, or else the only one of strings or integers.
        validation_fraction, test_fraction: share of the labelled images of train, in (0, 1), that a missing split
            takes. Stratified by class; validation is never cut from test.
        seed: of the splits. The same seed gives the same splits.
        on_bad_image: "error" meets an unreadable image when it is used; "skip" reads every image once, now, and leaves
            the unreadable ones out.
        high_bit_depth: of images of 16 or 32 bits or floats: "clip" trains on what `pipeline("image-classification")`
            shows the model, which may be all white; "scale" scales them to 8 bits when loaded, all by the same
            factor, and whoever calls pipeline() must do the same first. The notes say how many there are, and how.
        multi_label: an image has several labels: "cat;dog" in a cell (or a list); `none` for no class, an empty cell
            for an unlabelled image. The splits have the column `labels` too, (K,) of 1, 0 and -100.

    Raises:
        ValueError: for anything that cannot be loaded as asked; the sentence says what to type.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}, expected 'error' or 'skip'.")
    if high_bit_depth not in CHOICES:
        raise ValueError(f"high_bit_depth is {high_bit_depth!r}, expected 'clip' or 'scale'.")
    fractions = {"test": test_fraction, "validation": validation_fraction}
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise ValueError(f"{name}_fraction is {fraction}, expected a share between 0 and 1, such as 0.15.")
    if (
        not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32
    ):  # None would cut another split every time
        raise ValueError(f"seed (--split_seed) is {seed!r}, expected a whole number from 0 on, such as 42.")
    notes: list[str] = []
    splits = with_two_columns(
        open_source(source, notes, image_column, label_column), image_column, label_column, notes, multi_label
    )
    rows = len(splits["train"])
    if on_bad_image == "skip":
        splits = {name: readable(split, name, notes) for name, split in splits.items()}
    check_paths(splits["train"], notes)
    missing = {name: fraction for name, fraction in fractions.items() if name not in splits}
    if missing:
        splits |= _cut(splits["train"], missing, seed, notes)
    _check_labels(splits, notes)
    check_duplicates(splits, notes)
    splits = check_bit_depths(splits, high_bit_depth, notes)
    names = splits["train"].features["label"].names
    three = splits["train"], splits["validation"], splits["test"]
    return ImageData(*three, names, notes, source_name(source), high_bit_depth, train_rows=rows)


def readable(split: Dataset, name: str, notes: list[str]) -> Dataset:
    """The images of a split that can be decoded; the others are named in `notes`."""
    bad: list[str] = []
    kinds = Counter[str]()

    def reads(image: dict[str, Any], index: int) -> bool:
        try:
            decode_row(image, index, len(split))
        except ValueError:
            bad.append(image["path"] or f"image {index}")
            kinds[missing_reader(image["bytes"] or image["path"])] += 1
            return False
        return True

    # In memory, past the cache: it would remember which images are left out, but not their names.
    options = {"input_columns": ["image"], "with_indices": True, "keep_in_memory": True}
    kept = split.filter(reads, **options, desc=f"reading the images of {name}")
    why = "".join(f" {count} are {kind}." for kind, count in kinds.items() if kind)
    if not len(kept):
        found = f"None of the {len(split)} images of {name} could be read ({some(bad)}), expected images.{why}"
        raise ValueError(found)
    if bad:
        left = f"{len(bad)} of {len(split)} images of {name} could not be read and were left out: {some(bad)}.{why}"
        notes.append(left)
    return kept


def _cut(train: Dataset, shares: dict[str, float], seed: int, notes: list[str]) -> dict[str, Dataset]:
    """{"train": what is left, and a split for each share}: stratified, disjoint, unlabelled images stay in train."""
    from sklearn.model_selection import train_test_split  # here: importing the trainer imports this module

    labels = np.array(train["label"][:])
    rest = np.flatnonzero(labels != UNLABELLED)
    counts = Counter(labels[rest].tolist())
    sizes = {name: round(share * len(rest)) for name, share in shares.items()}
    names = train.features["label"].names
    splits = {}
    for name, size in sizes.items():
        by = strata(labels[rest], size) if SEVERAL in train.features else labels[rest]
        try:
            rest, cut = train_test_split(rest, test_size=size, stratify=by, random_state=seed)
        except ValueError as error:
            why = str(error).partition(". ")[0]  # it would list every class
            rarest = min(counts, key=lambda index: counts[index], default=0)
            raise ValueError(
                f"{size} images for {name} cannot be cut from the {sum(counts.values())} labelled images of train so "
                f"that each of {len(counts)} classes keeps its share: the rarest, {names[rarest]!r}, has "
                f"{counts[rarest]} images ({why}). Add images, raise {name}_fraction, or bring a {name} split."
            ) from error
        splits[name] = train.select(np.sort(cut))
        notes.append(
            f"No {name} split was found: {size} images were cut from train, "
            f"{'at random' if by is None else 'stratified by class'}, seed {seed}."
        )
    left = np.union1d(rest, np.flatnonzero(labels == UNLABELLED))
    notes.append(f"{len(left)} images are left in train.")
    return {"train": train.select(left), **splits}


def strata(rarest: np.ndarray, size: int) -> np.ndarray | None:
    """What a cut of images with several labels is stratified by: the rarest class; None where too few have it."""
    counts = np.unique(rarest, return_counts=True)[1]
    return rarest if counts.min() > 1 and len(counts) <= min(size, len(rarest) - size) else None


def _check_labels(splits: dict[str, Dataset], notes: list[str]) -> None:
    names = splits["train"].features["label"].names
    if len(names) < 2:
        raise ValueError(f"Train has one class only ({some(names)}), expected two or more.")
    folded = Counter(map(_folded, names))
    if alike := [name for name in names if folded[_folded(name)] > 1]:
        shown = some([repr(name) for name in alike])
        notes.append(
            f"Classes whose names differ in case, spaces or the form of accents alone: {shown}. Rename them if they "
            "are one."
        )
    seen = Counter(splits["train"]["label"][:])
    if unlabelled := seen.pop(UNLABELLED, 0):
        notes.append(f"{unlabelled} of {len(splits['train'])} images of train are unlabelled (-100).")
    for name in ("validation", "test"):
        counts = Counter(splits[name]["label"][:])
        if unlabelled := counts.pop(UNLABELLED, 0):
            raise ValueError(
                f"{unlabelled} images of {name} are unlabelled, expected a label on each; leave them out."
            )
        if SEVERAL in splits[name].features:
            continue  # an image's other classes may be in train
        refuse_unseen(name, Counter({names[index]: count for index, count in counts.items() if index not in seen}))
        if absent := [names[index] for index in sorted(seen) if index not in counts]:
            notes.append(f"{name.capitalize()} has no image of {some(absent)}: nothing is measured on them.")


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
