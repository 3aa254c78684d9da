"""Images a second of ImageDataset, against the usual loop, on JPEGs of 500 x 375 pixels; and each step alone.

    python benchmarks/loader.py              # 224 px, about 2 minutes on one core
    python benchmarks/loader.py --size 96

The usual loop: decode with Pillow's draft, cut a random part of the file, resize it once, mirror it, to normalised
float32. Both feed a DataLoader without workers; batches of 32 take turns in random order. Prints a table; RESULTS.md
keeps one with machine and date.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import default_data_collator

sys.path.insert(0, str(Path(__file__).parent))
from interleave import interleave, ratio

from hf_kdtl.commands.common.builders import new_processor
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.augmentation import Augmentation

BATCH, WIDTH, HEIGHT, FILES = 32, 500, 375, 256
CROP = {"resized_crop": [0.3, 1.0], "flip": True}
COLORS = CROP | {"color_jitter": 0.4, "random_erasing": 0.25}
SETTINGS = {
    "crop, flip": (CROP, 1.0),
    "crop, flip, color_jitter, random_erasing": (COLORS, 0.7),
    "all of these and mixup": (COLORS | {"mixup": 0.2}, 0.45),
    "all of these, mixup and cutmix": (COLORS | {"mixup": 0.2, "cutmix": 1.0}, 0.45),
}


def photograph(seed: int) -> bytes:
    """Random colors at every scale, as a JPEG of quality 90 (about 70 kB)."""
    draws, image = np.random.default_rng(seed), np.zeros((HEIGHT, WIDTH, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        grid = Image.fromarray(draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(grid.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float) - 127.5) / cells**0.6
    Image.fromarray(np.clip(127.5 + image, 0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()


class UsualLoop(torch.utils.data.Dataset):
    """What a training script does, written out; its random parts are as large as those of ImageDataset."""

    def __init__(self, files: list[bytes], size: int):
        self.files, self.size, self.draws = files, size, random.Random(0)

    def __len__(self) -> int:
        return len(self.files)

    def random_part(self, width: int, height: int) -> tuple[int, int, int, int]:
        area = self.draws.uniform(0.3, 1.0) * width * height
        aspect = math.exp(self.draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        aspect = min(max(aspect, area / height**2), width**2 / area)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        left, top = self.draws.randint(0, width - w), self.draws.randint(0, height - h)
        return left, top, left + w, top + h

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(io.BytesIO(self.files[index]))
        image.draft("RGB", (self.size, self.size))
        image = image.convert("RGB")
        image = image.crop(self.random_part(*image.size)).resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.draws.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(255)
        return {"pixel_values": pixels.sub_(0.5).div_(0.5), "labels": index % 10}


def ours(files: list[bytes], size: int, config: dict[str, Any] | None) -> ImageDataset:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    split = datasets.Dataset.from_dict({"image": [{"bytes": f, "path": None} for f in files]}, features=features)
    split = split.add_column("label", [index % 10 for index in range(len(files))])
    augmentation = None if config is None else Augmentation(config)
    return ImageDataset(split, new_processor(None, size), augmentation=augmentation, num_labels=10)


def loop(dataset: Any, batches: int):
    def run(done):
        left = batches
        while left:
            for _ in DataLoader(dataset, BATCH, shuffle=True, collate_fn=default_data_collator):
                done()
                if not (left := left - 1):
                    return

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="side of the model's images, in pixels")
    parser.add_argument("--batches", type=int, default=60, help="of each loop, in addition to 5 to warm up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = [photograph(seed) for seed in range(FILES)]
    print(f"{FILES} JPEGs of {WIDTH} x {HEIGHT}, {sum(map(len, files)) / FILES / 1000:.0f} kB each; {options.size} px")
    loops = {"the usual loop": loop(UsualLoop(files, options.size), options.batches + 5)}
    for name, (config, _) in {"without augmentation": (None, 0.0), **SETTINGS}.items():
        loops[name] = loop(ours(files, options.size, config), options.batches + 5)
    times = interleave(loops)
    print(
        "| augmentation | images/s | of the usual loop | 95 % interval | bound |\n| --- | ---: | ---: | --- | ---: |"
    )
    for name, seconds in times.items():
        each, low, high = ratio(times, "the usual loop", name)
        bound = SETTINGS[name][1] if name in SETTINGS else ""
        rate = BATCH / statistics.median(seconds)
        print(f"| {name} | {rate:.0f} | {each:.2f} | {low:.2f} to {high:.2f} | {bound} |")


if __name__ == "__main__":
    main()
