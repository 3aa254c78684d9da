"""Which block of the student goes with which block of the teacher: an explicit plan that one can read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from hf_kdtl.models.blocks import uniform_layers
from hf_kdtl.models.forward.classifier import blank_pixels
from hf_kdtl.models.forward.geometry import LayerGeometry, ModelGeometry, describe
from hf_kdtl.models.teachers.source import SignalSource

Layers = Literal["uniform", "last"] | list[list[int]]


@dataclass(frozen=True)
class Pair:
    """A block of the student and the block of the teacher it learns from."""

    student_layer: int
    teacher_layer: int
    student: LayerGeometry
    teacher: LayerGeometry

    def __str__(self) -> str:
        return f"student block {self.student_layer} <-> teacher block {self.teacher_layer}"

    def at(self, student: ModelGeometry | None, teacher: ModelGeometry | None) -> Pair:
        """The same pair with the grids that a batch has: its images may be of another size than the plan's."""
        mine = self.student if student is None else student.layers[self.student_layer]
        its = self.teacher if teacher is None else teacher.layers[self.teacher_layer]
        return self if mine is self.student and its is self.teacher else replace(self, student=mine, teacher=its)


@dataclass(frozen=True)
class PairingPlan:
    """What both models give, and the pairs of a `layers` choice. `str(plan)` is a table."""

    student: ModelGeometry
    teacher: ModelGeometry
    layers: Layers = "uniform"

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of the plan's own `layers`."""
        return self.pair(self.layers)

    def pair(self, layers: Layers) -> list[Pair]:
        """Pairs of blocks.

        uniform: block s of the student's L_S with block floor((s + 1) L_T / L_S) - 1 of the teacher's L_T; for a
        student that is deeper than its teacher, the same the other way round, so that no teacher block is used twice.
        last: the last with the last. A list [[s, t], ...]: as given, negative numbers from the end.

        Raises:
            ValueError: for another word, a block that does not exist, or one that is paired twice.
        """
        depth_s, depth_t = len(self.student.layers), len(self.teacher.layers)
        if layers == "last":
            indices = [(depth_s - 1, depth_t - 1)]
        elif layers == "uniform" and depth_s <= depth_t:
            indices = list(enumerate(uniform_layers(depth_s, depth_t)))
        elif layers == "uniform":
            indices = [(s, t) for t, s in enumerate(uniform_layers(depth_t, depth_s))]
        elif isinstance(layers, list) and layers and all(_is_pair(entry) for entry in layers):
            indices = [(_index(s, depth_s, "student"), _index(t, depth_t, "teacher")) for s, t in layers]
            for who, column in (("student", [s for s, _ in indices]), ("teacher", [t for _, t in indices])):
                if repeated := sorted({i for i in column if column.count(i) > 1}):
                    raise ValueError(f"layers pairs the {who}'s blocks {repeated} more than once; name each once.")
        else:
            raise ValueError(f"layers is {layers!r}; expected 'uniform', 'last', or pairs such as [[0, 1], [1, 3]].")
        return [Pair(s, t, self.student.layers[s], self.teacher.layers[t]) for s, t in indices]

    def __str__(self) -> str:
        models = (("student", self.student), ("teacher", self.teacher))
        header = ", ".join(f"{w} {m.name} ({len(m.layers)} blocks, {_size(m.image)} px)" for w, m in models)
        rows = [("student", "teacher", "student gives", "teacher gives", "what is done")]
        for pair in self.pairs:
            blocks = f"{pair.student_layer:>7}", f"{pair.teacher_layer:>7}"
            rows.append((*blocks, _gives(pair.student), _gives(pair.teacher), "; ".join(_done(pair)) or "as they are"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([header, *lines])


def plan(
    student: nn.Module,
    teacher: nn.Module | SignalSource,
    layers: Layers = "uniform",
    pixel_values: Tensor | None = None,
) -> PairingPlan:
    """Look at both models with one small forward each, and pair their blocks.

    Args:
        teacher: a model, or a source of signals such as a `Teacher` (which sees the pixels in its own format).
        layers: uniform | last | [[student block, teacher block], ...].
        pixel_values: (B, C, h, w) of the student; by default zeros of its config's image_size.

    Raises:
        ValueError: when blocks cannot be found, no image size is known, or `layers` does not fit.
    """
    if pixel_values is None:
        pixel_values = blank_pixels(student)
    its = describe(teacher, pixel_values) if isinstance(teacher, nn.Module) else teacher.geometry(pixel_values)
    made = PairingPlan(describe(student, pixel_values), its, layers)
    assert made.pairs  # a wrong `layers` fails here, not at first use
    return made


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(type(i) is int for i in entry)


def _index(i: int, depth: int, who: str) -> int:
    if not -depth <= i < depth:
        raise ValueError(
            f"layers names block {i} of the {who}, which has the blocks 0 to {depth - 1} (-1 is the last)."
        )
    return i % depth


def _size(size: tuple[int, int] | None) -> str:
    return "?" if size is None else f"{size[0]} x {size[1]}"


def _gives(layer: LayerGeometry) -> str:
    prefix = "+".join(layer.prefix[:2]) + (f"+{len(layer.prefix) - 2} more" if len(layer.prefix) > 2 else "")
    what = f"{layer.layout} {_size(layer.grid)}{' +' + prefix if prefix else ''}, width {layer.width}"
    return what + (f", {layer.heads} heads {layer.attention}" if layer.heads else f", attention {layer.attention}")


def _done(pair: Pair) -> list[str]:
    done = []
    if pair.student.grid != pair.teacher.grid:
        done.append(f"grid {_size(pair.teacher.grid)} -> {_size(pair.student.grid)}")
    for who, mine, other in (("teacher", pair.teacher, pair.student), ("student", pair.student, pair.teacher)):
        dropped = [role for role in mine.prefix if role not in other.prefix or role != "class"]
        if dropped:
            done.append(f"{who}'s {', '.join(sorted(set(dropped)))} dropped")
    if pair.student.width != pair.teacher.width:
        done.append(f"width {pair.student.width} -> {pair.teacher.width} (projector)")
    if pair.student.heads != pair.teacher.heads and pair.student.heads and pair.teacher.heads:
        done.append(f"heads {pair.teacher.heads} and {pair.student.heads} averaged or re-split")
    return done
