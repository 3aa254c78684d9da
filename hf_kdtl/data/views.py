"""The augmented images of a split: each view of each image, as the models' image processors would show it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_kdtl.data.augmentation import VIEW_VERSION, Augmentation, Mixing, soft_labels
from hf_kdtl.data.columns import UNLABELLED, source_rows
from hf_kdtl.data.on_device import CHANGES, PARTNERS, Scale, described, finished
from hf_kdtl.data.rendering import Renderer, check_sizes, mix, own_weight, render
from hf_kdtl.data.several import SEVERAL, labels_of

if TYPE_CHECKING:
    from datasets import Dataset


class Views:
    """Views of the images of a split.

    Args:
        split: as of `ImageDataset`.
        processors: image processors by the key of an item under which their pixels go; the first is the student's.

    Raises:
        ValueError: for a processor whose steps cannot be replayed.
    """

    def __init__(
        self,
        split: Dataset,
        augmentation: Augmentation,
        processors: Mapping[str, Any],
        view_seed: int,
        num_labels: int,
    ):
        self.split, self.augmentation = split, augmentation
        self.view_seed, self.num_labels = view_seed, num_labels
        self.rows = source_rows(split)
        self.renderers = {key: Renderer(processor) for key, processor in processors.items()}
        if augmentation.mixes and SEVERAL in split.features:
            raise ValueError("mixup and cutmix mix one label an image, and the data has several; leave them out.")
        if augmentation.mixes:
            self.labelled = np.array(split["label"][:]) != UNLABELLED
            order = np.argsort(self.rows, kind="stable")
            # Partners by their row as it was loaded, so that the order of the split does not matter.
            self.candidates = {status: order[self.labelled[order] == status] for status in (False, True)}

    def items(self, indices: Sequence[int], views: Sequence[int], unfinished: bool = False) -> list[dict[str, Any]]:
        """{key: (C, h, w) float32, "labels": int or (K,) float32} of each image in its view.

        Args:
            unfinished: leave colors, erasing and mixing to `finish`.
        """
        drawn = [self._draw(index, view) for index, view in zip(indices, views, strict=True)]
        mixing = [changes.mixing for changes in drawn if changes.mixing is not None]
        partners = [self._partner(index, one) for index, one in zip(indices, mixing, strict=False)]
        theirs = [self._draw(index, view) for index, view in zip(partners, views, strict=False)]
        rows = self.split[[*indices, *partners]]
        cells = zip(rows["image"], [*indices, *partners], drawn + theirs, strict=True)
        renderers = list(self.renderers.values())
        now = partial(replace, factors=None, erased=None) if unfinished else lambda changes: changes
        shown = [render(cell, index, len(self.split), renderers, now(changes)) for cell, index, changes in cells]
        labels: Any = labels_of(rows)
        found: list[dict[str, Any]] = [{} for _ in indices]
        for (key, renderer), pixels in zip(self.renderers.items(), zip(*shown, strict=True), strict=True):
            check_sizes([image.shape for image in pixels], renderer.processor)
            weights: Sequence[float]
            if not mixing or unfinished:
                values: Sequence[Any] = [renderer.values(image) for image in pixels]
                weights = [own_weight(one, pixels[0].shape[:2]) for one in mixing]
            else:
                both = zip(mixing, pixels[: len(indices)], pixels[len(indices) :], strict=True)
                values, weights = zip(*(mix(renderer, *one) for one in both), strict=True)
            if mixing and key == next(iter(self.renderers)):  # by the areas of the student's pixels
                own, other = torch.tensor(labels).chunk(2)
                labels = soft_labels(own, other, torch.tensor(weights), self.num_labels)
            for item, value in zip(found, values, strict=False):  # those of partners come after
                item[key] = value
            if unfinished:
                self._describe(found, drawn, theirs, values)
        return [item | {"labels": label} for item, label in zip(found, labels, strict=True)]

    def _describe(
        self, items: list[dict[str, Any]], drawn: list[Any], theirs: list[Any], values: Sequence[Any]
    ) -> None:
        size = values[0].shape[-2:]
        partners: list[Any] = theirs or [None] * len(items)
        for item, changes, partner in zip(items, drawn, partners, strict=True):
            item[CHANGES] = described(changes, partner, changes.mixing, size)
        for item, value in zip(items, values[len(items) :], strict=False):
            item[PARTNERS] = value

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of unfinished items, with colors, erasing and mixing, on the device of its pixels."""
        rest = {key: value for key, value in batch.items() if key not in (CHANGES, PARTNERS)}
        scale = Scale.of(next(iter(self.renderers.values())))
        return rest | {"pixel_values": finished(batch["pixel_values"], batch[CHANGES], batch.get(PARTNERS), scale)}

    def facts(self) -> dict[str, Any]:
        """What decides the pixels of (row, view) in addition to the images and the processors, as plain data."""
        settings = dict(self.augmentation.config)
        if isinstance(crop := settings.get("crop"), int):
            size = next(iter(self.renderers.values())).format.size
            settings["crop"] = f"{crop} of {'x'.join(map(str, size)) if size else 'the image'} pixels"
        found = {"view_version": VIEW_VERSION, "view_seed": self.view_seed, "augmentation": settings}
        if self.augmentation.mixes:
            order = np.argsort(self.rows, kind="stable")
            known = np.stack([self.rows[order], self.labelled[order]])
            found["partners"] = hashlib.blake2b(known.astype("<i8").tobytes(), digest_size=16).hexdigest()
        return found

    def _draw(self, index: int, view: int) -> Any:
        return self.augmentation.draw(self.view_seed, view, int(self.rows[index]))

    def _partner(self, index: int, mixing: Mixing) -> int:
        candidates = self.candidates[bool(self.labelled[index])]
        return int(candidates[int(mixing.partner * len(candidates))])
