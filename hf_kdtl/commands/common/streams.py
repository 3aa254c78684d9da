"""The images of `--streaming true`: shards that are read as they come, and the few of them that are held out."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import datasets
from datasets import Dataset

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.data.augmentation import Augmentation
from hf_kdtl.data.columns import with_rows
from hf_kdtl.data.stream import ImageStream, find_shards, open_stream
from hf_kdtl.data.unlabelled import without_labels

HELD_OUT = 512  # of the first shard, at most: they are in memory
COUNTS_AS = 100_000  # images, for the defaults


class Streamed:
    """Shards, of whose first one the first images are held out.

    Args:
        source: what `find_shards` takes.
        buffer: of `ImageStream`.
        notes: sentences are appended to it.
    """

    def __init__(self, source: str, options: DataOptions, buffer: int, notes: list[str]):
        shards = find_shards(source)
        self.buffer, self.data = buffer, open_stream(shards, options.image_column)
        first = open_stream(shards[:1], options.image_column)
        cells = [row["image"] for row in itertools.islice(first, int(HELD_OUT / options.validation_fraction))]
        number = int(len(cells) * options.validation_fraction)
        if number < 2:
            raise ValueError(f"{shards[0]} holds {len(cells)} images, too few to hold some out; expected 16 or more.")
        features = datasets.Features({"image": datasets.Image(decode=False)})
        found = Dataset.from_dict({"image": cells[:number]}, features=features)
        self.held_out = without_labels(with_rows(found), ["unlabelled"])
        self.left_out = {shards[0]: number}
        notes.append(f"{source}: a stream of {len(shards)} shards; {number} images of the first one are held out.")
        notes.append(f"A stream has no length: the settings that were not typed are those of {COUNTS_AS:,} images.")

    def pixels(self, processor: Any, options: DataOptions, config: DistillationConfig) -> ImageStream:
        """What the model is fed."""
        settings = cli.mapping("augmentation", options.augmentation)
        return ImageStream(
            self.data,
            processor,
            augmentation=Augmentation(settings) if settings else None,
            buffer=self.buffer,
            held_out=self.left_out,
            seed=config.seed,
            view_seed=config.view_seed,
            views=options.views,
        )


def check_streaming(options: Any, data: DataOptions, config: DistillationConfig, typed: Collection[str]) -> None:
    """Refuse what a stream cannot give, before anything is read.

    Raises:
        ValueError: saying what to type.
    """
    if "max_steps" not in typed or config.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: a stream has no length, so no number of passes says its end.")
    if options.shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer is {options.shuffle_buffer}; expected 1 image or more.")
    refused = {
        "on_bad_image": (data.on_bad_image != "error", "an image that cannot be read stops the run, naming it"),
        "high_bit_depth": (data.high_bit_depth != "clip", "images of more than 8 bits are clipped"),
        "teacher_pixels": (config.teacher_pixels == "own", "the teacher sees the student's pixels"),
    }
    for name, (asked, what) in refused.items():
        if asked:
            raise ValueError(f"{name} does not go with --streaming, where {what}. Leave it out.")
