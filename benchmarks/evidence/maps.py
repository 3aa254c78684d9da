"""Where a teacher's features are strong, for the views of table 1: what attention_transfer reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.evidence.views import Answers, as_seen
from hf_kdtl.models import Capture, Teacher
from hf_kdtl.models.forward.geometry import ModelGeometry
from hf_kdtl.models.forward.needs import Needs


class AnswersAndMaps(Answers):
    """The teacher's logits, and of some blocks sqrt(mean_d h_d^2) of each cell: a map of one channel with the same
    energy as the block's own.

    Args:
        logits: (n V, K).
        maps: {block: (n V, 1, gh, gw)}.
        geometry: the teacher's.
    """

    def __init__(self, logits: Tensor, maps: dict[int, Tensor], geometry: ModelGeometry):
        super().__init__(logits)
        self.maps, self.known = maps, geometry

    def unserved(self, needs: Needs) -> str:
        held = Needs(logits=True, hidden_states=frozenset(self.maps))
        return "" if needs | held == held else f"only logits and maps of blocks are held, and this reads {needs}."

    def geometry(self, pixel_values: Tensor) -> ModelGeometry:
        return self.known

    def capture(self, pixel_values: Tensor, needs: Needs, batch: Any = None) -> Capture:
        found = super().capture(pixel_values, needs, batch)
        found.hidden_states = {block: self.maps[block][batch["image_index"]] for block in needs.hidden_states}
        found.geometry = self.known
        return found


def maps_of(teacher: Teacher, pixels: np.ndarray, blocks: tuple[int, ...], file: Path) -> dict[int, Tensor]:
    """{block: (n V, 1, gh, gw)} of (n, V, 3, h, w) uint8 views, made on first use."""
    if not file.exists():
        needs, found = Needs(hidden_states=frozenset(blocks)), {block: [] for block in blocks}
        views = pixels.reshape(-1, *pixels.shape[2:])
        for part in tqdm(np.array_split(views, max(1, len(views) // 250)), "maps"):
            with torch.inference_mode():
                captured = teacher.capture(as_seen(teacher, part), needs)
            for block in blocks:
                strength = captured.hidden_states[block].square().mean(1, keepdim=True).sqrt()
                found[block].append(strength.half().numpy())
        np.savez(file, **{str(block): np.concatenate(parts) for block, parts in found.items()})
    held = np.load(file)
    return {block: torch.from_numpy(held[str(block)]).float() for block in blocks}
