"""The teacher's tensors, sliced to the student's shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdtl.models.blocks import find_blocks, uniform_layers, vision_config
from hf_kdtl.models.cutting.families import Sizes, head_width
from hf_kdtl.models.cutting.importance import ATTENTION_OUT, MLP_OUT, Scores

_QKV = ("q_proj", "k_proj", "v_proj", "in_proj_weight", "in_proj_bias", "query", "key", "value")
_MLP_IN = ("fc1", "gate_proj", "up_proj", "intermediate.dense", "weights_in")


def copy_weights(
    teacher: PreTrainedModel, student: PreTrainedModel, picks: list[int], full: Sizes, scores: Scores | None
) -> None:
    """Give every tensor of `student` the values, dtype and device of its source in `teacher`.

    Args:
        picks: the teacher's blocks that the student has, in order.
        full: the teacher's sizes.
        scores: which heads and neurons to keep, the highest; without, evenly spaced ones.

    Raises:
        ValueError: when the teacher's tensors are not those of its config.
    """
    blocks = [name for name, _ in find_blocks(teacher)]
    kept = [blocks[pick] for pick in picks]
    renamed = dict(zip(kept, (name for name, _ in find_blocks(student)), strict=True))
    expected = {key: tensor.shape for key, tensor in student.state_dict().items()}
    slicer = _Slicer(teacher.config, full, scores)
    source: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        block = next((name for name in blocks if key.startswith(f"{name}.")), None)
        if block is not None and block not in renamed:
            continue
        new = key if block is None else renamed[block] + key.removeprefix(block)
        index = None if block is None else blocks.index(block)
        source[new] = slicer.cut(key, tensor, expected.get(new), index).clone()
    found = {key: tensor.shape for key, tensor in source.items()}
    if expected != found:
        differing = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        lines = [f"{key}: expected {_shape(expected, key)}, found {_shape(found, key)}" for key in differing[:5]]
        raise ValueError(
            f"{len(differing)} tensors of the teacher are not those that a {type(teacher).__name__} of its config has:"
            f" {'; '.join(lines)}. The student would not be a copy. Merge adapters, or put the config right "
            "(num_labels for a replaced head) and load the teacher again."
        )
    student.load_state_dict(source, assign=True)


class _Slicer:
    """Which rows and columns of a tensor stay.

    Where a shape is the student's already, all. Else a dimension is heads (rows of the queries, keys and values,
    columns of the attention's output), neurons (rows and columns of the MLP), or channels of the residual stream.
    """

    def __init__(self, config: Any, full: Sizes, scores: Scores | None):
        self.full, self.scores = full, scores
        self.head_width = head_width(config) if full.heads else 0
        # One bias table for all blocks: the same heads then go everywhere.
        self.shared = bool(getattr(vision_config(config), "use_shared_relative_position_bias", False))

    def cut(self, key: str, tensor: Tensor, wanted: torch.Size | None, block: int | None) -> Tensor:
        """The tensor in the shape `wanted`; as it is where that cannot be made of it."""
        if wanted is None or len(wanted) != tensor.ndim:
            return tensor
        for dimension, (found, size) in enumerate(zip(tensor.shape, wanted, strict=True)):
            if size < found and (index := self._index(key, dimension, found, size, block)) is not None:
                tensor = tensor.index_select(dimension, index.to(tensor.device))
        return tensor

    def _index(self, key: str, dimension: int, found: int, size: int, block: int | None) -> Tensor | None:
        module = key if key.endswith(_QKV) else key.rpartition(".")[0]
        if dimension == 1 and key.endswith("relative_position_bias_table"):
            return self._heads(found, size, 1, block)
        if (module.endswith(_QKV) and dimension == 0) or (module.endswith(ATTENTION_OUT) and dimension == 1):
            return self._heads(found, size, self.head_width, block)
        inward, outward = module.endswith(_MLP_IN), module.endswith(MLP_OUT)
        if (inward and dimension == 0) or (outward and dimension == 1):
            parts = 2 if module.endswith("weights_in") else 1  # the gates, and what goes through them
            scores = self.scores.neurons.get(block) if self.scores else None
            return _repeated(_best(found // parts, size // parts, scores), found // parts, parts)
        width = self.full.width
        if not width or found % width or size % (found // width):
            return None
        channels = _best(width, size // (found // width), None)
        return _repeated(channels, width, found // width)

    def _heads(self, found: int, size: int, unit: int, block: int | None) -> Tensor | None:
        heads = self.full.heads
        if not unit or found % (heads * unit):
            return None
        parts = found // (heads * unit)  # 3 where queries, keys and values lie in one tensor
        scores = None
        if self.scores is not None and self.scores.heads:
            of_blocks = self.scores.heads
            scores = sum(of_blocks.values()) if self.shared else of_blocks.get(block)
        kept = _best(heads, size // (parts * unit), scores)
        rows = (kept[:, None] * unit + torch.arange(unit)).flatten()
        return _repeated(rows, heads * unit, parts)


def _best(of: int, count: int, scores: Any) -> Tensor:
    """`count` of `of`, in order: those that score highest, or evenly spaced."""
    if scores is None:
        return torch.tensor(uniform_layers(count, of))
    return scores.cpu().topk(count).indices.sort().values


def _repeated(index: Tensor, length: int, parts: int) -> Tensor:
    return torch.cat([index + part * length for part in range(parts)])


def _shape(shapes: dict[str, torch.Size], key: str) -> str:
    return str(tuple(shapes[key])) if key in shapes else "none"
