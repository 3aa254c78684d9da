"""What objectives ask a forward for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hf_kdtl.models.forward.perturbations import Direction, Sketch


@dataclass(frozen=True)
class Needs:
    """What an objective must have captured of one model. `a | b` is what serves both.

    Args:
        logits: the class outputs.
        pooled: the embedding of an image: what the classifier reads, or what the geometry's `pooling` says.
        patches: the patch tokens after the last norm, and their grid.
        hidden_states: blocks whose output is needed, counted from 0.
        attention: blocks whose query, key and value are needed.
        attention_rows: blocks whose attention of the first token is needed, mean over the heads.
        sketches: random projections of the gradient of a class output by the pixels, of a teacher alone.
        block_calls: blocks that are called again, with the inputs that this forward gave them.
        input_gradient: the gradient of outputs by the pixels is taken.
        order: the highest derivative taken of this forward, by pixels and parameters together. From 2, attention runs
            its math kernel (so does a pass in forward mode, which must see the same dropout masks); from 3, layer
            norms are composed.
        directions: further forwards at shifted pixels. Those that several objectives ask for are run once.
        fraction: the largest share of the images that the last three are needed for. `capture` itself serves all the
            images it is given.
        weights: of the start model: the student's tensors paired with its own (`Capture.weights`). Alone it costs no
            forward.
    """

    logits: bool = False
    pooled: bool = False
    patches: bool = False
    hidden_states: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    attention_rows: frozenset[int] = frozenset()
    sketches: frozenset[Sketch] = frozenset()
    block_calls: frozenset[int] = frozenset()
    input_gradient: bool = False
    order: int = 0
    directions: frozenset[Direction] = frozenset()
    fraction: float = 0.0
    weights: bool = False

    def __or__(self, other: Needs) -> Needs:
        if not other:
            return self
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Needs(**{k: max(a, b) if k in ("order", "fraction") else a | b for k, (a, b) in pairs.items()})

    def __bool__(self) -> bool:
        return self != NOTHING

    @property
    def derivative(self) -> bool:
        """Whether the pixels are differentiated or shifted."""
        return self.input_gradient or bool(self.directions) or bool(self.sketches)

    @property
    def reads_blocks(self) -> bool:
        """Whether anything is read off single blocks, which must then be known."""
        return bool(self.hidden_states or self.tapped or self.block_calls or self.patches)

    @property
    def tapped(self) -> frozenset[int]:
        """The blocks whose query and key are read."""
        return self.attention | self.attention_rows

    def plain(self) -> Needs:
        """What one ordinary forward serves."""
        if not (self.derivative or self.order or self.fraction):
            return self
        none: frozenset = frozenset()
        return replace(self, input_gradient=False, order=0, directions=none, sketches=none, fraction=0.0)


NOTHING = Needs()
