"""One forward of one model, and what objectives may read of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.functional import derivatives, hessian
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.attention_hooks import Attention, attention_setting, first_row, recording, run
from hf_kdtl.models.forward.block_calls import BlockCall, block_calls
from hf_kdtl.models.forward.classifier import check_outputs, pooled_features
from hf_kdtl.models.forward.embedding import is_headless, tower_outputs
from hf_kdtl.models.forward.final import check_complete, read_final
from hf_kdtl.models.forward.geometry import ModelGeometry, at_size, describe, flat_attentions
from hf_kdtl.models.forward.modes import contiguous_gradients, running_statistics
from hf_kdtl.models.forward.needs import Needs
from hf_kdtl.models.forward.perturbations import Direction, RNGState, Sketch, input_leaf


@dataclass(frozen=True)
class WeightPair:
    """A trainable tensor of the student, and what it was at the start.

    Args:
        name: of the parameter; of the layer, where adapters change it.
        now: with its graph. Under LoRA the difference that the adapters make to a weight.
        then: of the same shape, without one; zeros under LoRA, None for the head.
        head: whether it belongs to the classifier, which a start of other classes does not have.
    """

    name: str
    now: Tensor
    then: Tensor | None
    head: bool


@dataclass
class Capture:
    """What one forward gave. Only what was asked for is there.

    Args:
        logits: (B, K) class outputs, as the model gave them; a teacher's columns are in the student's class order.
            None of a source without a classifier: objectives that read it are refused before training.
        pixel_values: (B, C, h, w) the pixels this model saw.
        outputs: the model's own output object.
        pooled: (B, D) the embedding, if needed: what the classifier reads, or would read.
        patches: (B, P, D) the patch tokens after the last norm, row by row; a map's cells.
        patch_grid: (gh, gw) of these.
        image_index: (B,) rows of the data, where the data carries them; of a sample that is read before training.
        hidden_states: {layer: (B, N, D) tokens, or (B, D, gh, gw) maps}, the outputs of blocks.
        attention: {layer: query, key, value (B, H, N, d), scale, bias}.
        attention_rows: {layer: (B, N) log-probabilities}, the first token's attention, mean over the heads.
        sketches: {sketch: (B, r)} of a teacher; of the images `differentiated_rows` alone where there are any.
        geometry: prefix tokens and grid of each block.
        x: the student's pixels, by which is differentiated; its leaf of the graph where a gradient is needed.
        differentiated: the capture that serves derivatives, of the images `differentiated_rows` alone; None where it
            is this one, or where no image was chosen.
        differentiated_rows: (b,) the images of this batch that are differentiated; None means all.
        weights: the student's trainable tensors and what they were at the start; of a start model alone.
        block_calls: {layer: the block and what this forward called it with}.
    """

    logits: Tensor = None  # type: ignore[assignment]  # to be read where there are any
    pixel_values: Tensor = None  # type: ignore[assignment]  # None of a source that needs no pixels
    outputs: Any = None
    pooled: Tensor | None = None
    patches: Tensor | None = None
    patch_grid: tuple[int, int] | None = None
    image_index: Tensor | None = None
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    attention_rows: dict[int, Tensor] = field(default_factory=dict)
    sketches: dict[Sketch, Tensor] = field(default_factory=dict)
    geometry: ModelGeometry | None = None
    x: Tensor | None = None
    differentiated: Capture | None = None
    differentiated_rows: Tensor | None = None
    weights: list[WeightPair] = field(default_factory=list)
    block_calls: dict[int, BlockCall] = field(default_factory=dict, repr=False)
    _rerun: Callable[..., Capture] | None = field(default=None, repr=False)
    _context: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False)
    _shifted: dict[tuple[Direction, Draws, bool], Tensor] = field(default_factory=dict, repr=False)

    def input_gradient(self, scalar: Tensor, create_graph: bool = True) -> Tensor:
        """d scalar_b / d x_b, (B, C, h, w), of a scalar (B,) made of this capture.

        Raises:
            ValueError: when nothing leads from it to the pixels.
        """
        return derivatives.input_gradient(scalar, self.input_leaf(), create_graph)

    def hvp(self, scalar: Tensor, v: Tensor, create_graph: bool = True) -> Tensor:
        """H v of a scalar (B,) made of this capture, with the shape of x. Needs `order` 2; 3 to train by it."""
        return hessian.hvp_of(scalar, self.input_leaf(), v, create_graph)

    def directional(
        self, u: Tensor, scalar: Callable[[Capture], Tensor] = lambda c: c.logits, step: float | None = None
    ) -> Tensor:
        """The derivative along u of a scalar made of a capture; by default of the logits, (B, K).

        Another pass of the model under the same masks: in forward mode, or with a `step` as a central difference of
        two passes in full precision.
        """
        x, again = self.input_leaf(), self._rerun
        assert again is not None
        with self._context():
            if step is None:
                return derivatives.directional(lambda z: scalar(again(z, forward_mode=True)), x, u)
            return derivatives.central_difference(lambda z: scalar(again(z, precise=True)), x, u, step)

    def logits_at(self, direction: Direction, draws: Draws, precise: bool = True) -> Tensor:
        """The logits at x + step u, (B, K), under the same masks; run once for all who ask.

        Args:
            precise: with autocast off, as a difference of two such logits needs.
        """
        x, again = self.input_leaf().detach(), self._rerun
        assert again is not None
        rounded = torch.is_autocast_enabled(x.device.type)
        if direction.step == 0 and not (precise and rounded):
            return self.logits
        key = direction, draws, precise or not rounded
        if key not in self._shifted:
            shifted = x + direction.step * direction.draw(draws, x) if direction.step else x
            with self._context():
                self._shifted[key] = again(shifted, precise=precise).logits
        return self._shifted[key]

    def input_leaf(self) -> Tensor:
        """The pixels that derivatives are by.

        Raises:
            ValueError: when this capture was not made for derivatives.
        """
        if self.x is None:
            raise ValueError("this capture cannot be differentiated: its Needs had no input_gradient or directions.")
        return self.x


def capture(
    model: nn.Module,
    pixel_values: Tensor,
    needs: Needs,
    geometry: ModelGeometry | None = None,
    *,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
    shown: Callable[[Tensor], Tensor] | None = None,
    classes: Sequence[int] | None = None,
    **inputs: Any,
) -> Capture:
    """Run one forward and keep what is needed.

    The model runs its own kernels: attention is read as query, key and value on the way in, and nothing of size N x N
    is built here. What is kept holds the graph, and is freed with the Capture.

    Args:
        model: an image classifier or a headless vision model of transformers, or anything called with
            `pixel_values=` that gives `.logits`.
        pixel_values: (B, C, h, w).
        needs: what must be captured; an empty `Needs` still runs the model and gives its logits.
        geometry: of this model at this image size; by default looked up with one more small forward, if needed.
        context: makes the context that this forward and later passes run in.
        shown: what the model is shown for these pixels (a teacher's re-normalisation and size). Derivatives are by
            `pixel_values`, so it is part of the function that is differentiated.
        classes: the order in which the logits are wanted.
        inputs: further keyword arguments of the model's forward.

    Raises:
        ValueError: when the model gives no logits, does not run on images of this size or on images alone, has no
            such layer, gives nothing for a layer that was asked for, or is asked for derivatives by integers.
    """

    def forward(x: Tensor, wanted: Needs) -> Capture:
        got = _forward(model, x if shown is None else shown(x), wanted, geometry, inputs)
        if classes is not None:
            got.logits = got.logits[:, classes]
        return got

    if not needs.derivative:
        with context():
            return forward(pixel_values, needs)
    x, state = input_leaf(pixel_values, needs.input_gradient), RNGState(pixel_values.device)
    kernel = partial(derivatives.differentiable, needs.order)
    trained = torch.is_grad_enabled()  # a teacher's passes leave no graph to its weights

    def again(z: Tensor, precise: bool = False, forward_mode: bool = False) -> Capture:
        full = torch.autocast(z.device.type, enabled=False) if precise else nullcontext()
        mine = nullcontext() if forward_mode else kernel()  # forward mode sets its own
        with torch.set_grad_enabled(trained), running_statistics(model), state.replay(), mine, full:
            return forward(z, Needs(pooled=needs.pooled, patches=needs.patches, hidden_states=needs.hidden_states))

    with torch.set_grad_enabled(trained or needs.input_gradient), context(), running_statistics(model), kernel():
        got = forward(x, needs.plain())
    got.x, got._rerun, got._context = x, again, context
    return got


def _forward(
    model: nn.Module, pixel_values: Tensor, needs: Needs, geometry: ModelGeometry | None, inputs: dict[str, Any]
) -> Capture:
    layers = needs.tapped | needs.hidden_states | needs.block_calls
    if (layers or needs.patches or (needs.pooled and is_headless(model))) and geometry is None:
        geometry = describe(model, pixel_values)
    if geometry is not None and layers and not layers <= set(range(len(geometry.layers))):
        raise ValueError(
            f"{geometry.name} has the blocks 0 to {len(geometry.layers) - 1}; asked for {sorted(layers)}."
        )
    by_weights = bool(needs.tapped) and geometry is not None and geometry.weights_only
    with ExitStack() as stack:
        stack.enter_context(contiguous_gradients(model, pixel_values))
        tapped = frozenset() if by_weights else needs.tapped
        by_head = needs.pooled and (geometry is None or geometry.pooling in ("", "classifier"))
        # First: it may need a forward of its own.
        read = stack.enter_context(pooled_features(model, pixel_values)) if by_head else []
        recorder = stack.enter_context(recording(model, tapped, needs.hidden_states))
        calls = stack.enter_context(block_calls(model, needs.block_calls))
        if by_weights:
            stack.enter_context(attention_setting(model, "eager"))
            inputs = {**inputs, "output_attentions": True}
        after = needs.patches or (needs.pooled and not by_head)
        towers = stack.enter_context(tower_outputs(model)) if after else []
        outputs = run(model, pixel_values, inputs)
    logits: Any = getattr(outputs, "logits", None)
    check_outputs(model, logits if needs.logits else None)
    attention = recorder.attention
    if by_weights:
        weights = flat_attentions(outputs)
        attention = {i: Attention(None, None, None, 1.0, None, weights[i]) for i in needs.tapped}
    final = read_final(model, geometry, towers, pixel_values, needs.pooled and not by_head)
    final = final._replace(pooled=read[0]) if read else final
    check_complete(type(model).__name__, needs, attention, recorder.hidden_states, final)
    if geometry is not None:
        geometry = at_size(geometry, pixel_values, recorder.hidden_states, attention)
    return Capture(
        logits, pixel_values, outputs, *final, hidden_states=recorder.hidden_states,
        attention={i: attention[i] for i in needs.attention}, geometry=geometry, block_calls=calls,
        attention_rows={i: first_row(attention[i]) for i in needs.attention_rows},
    )  # fmt: skip
