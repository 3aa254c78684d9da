"""How much each block, head and neuron matters for the loss, by the first order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.functional.divergences import check_labels, cross_entropy, labelled
from hf_kdtl.functional.multi_label import binary_cross_entropy
from hf_kdtl.models.blocks import find_blocks, vision_config
from hf_kdtl.models.cutting.families import head_width, sizes_of
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.labels import is_multi_label

SAMPLE = 256  # images, at most
_BATCH = 32


@dataclass(frozen=True)
class Scores:
    """Importance, >= 0, larger matters more.

    Args:
        blocks: (L,), of what each block adds to the residual stream.
        heads: {block: (H,)}; empty where heads differ by stage.
        neurons: {block: (M,)}. For parts outside the blocks (SigLIP's pooling) there are no scores.
    """

    blocks: Tensor
    heads: dict[int | None, Tensor]
    neurons: dict[int | None, Tensor]


def first_order(model: Any, data: Any) -> Scores:
    """|sum over images <a, dL/da>| for each block, head and neuron, with a its output and L the cross-entropy, of
    several labels the binary one.

    To the first order it is by how much the summed loss changes when this output is set to zero. [paper: Michel et
    al. 2019, arXiv 1905.10650, whose absolute value is inside the mean over images; Molchanov et al. 2019, arXiv
    1906.10771, who square; the absolute value of the sum is ours]

    Args:
        model: an image classifier; it runs in eval mode and its weights get no gradient.
        data: a data set or list of rows with pixel_values (C, h, w), as the model reads them, and labels, a class or
            (K,); at most `SAMPLE` of them are used, evenly spaced, without those that have no label.

    Cost: one forward and one backward of these images.

    Raises:
        ValueError: without data, without labels, or for a model without logits or of which nothing can be left out.
    """
    sizes_of(model)  # refuses what cannot be cut
    if data is None or not len(data):
        raise ValueError(
            "importance='first_order' needs data: rows with pixel_values and labels, such as "
            "data=hf_kdtl.data.ImageDataset(split, processor); or type importance='uniform'."
        )
    rows = [data[i * len(data) // min(SAMPLE, len(data))] for i in range(min(SAMPLE, len(data)))]
    rows = [row for row in rows if row.get("labels") is not None and labelled(torch.as_tensor(row["labels"])[None])]
    if not rows:
        raise ValueError("importance='first_order' needs images with labels; or type importance='uniform'.")
    sums: dict[tuple[str, int], Tensor] = {}
    with evaluating(model):
        for start in range(0, len(rows), _BATCH):
            _add_batch(model, rows[start : start + _BATCH], sums)
    blocks = torch.stack([sums["block", i] for i in range(len(find_blocks(model)))])
    parts: dict[str, dict[int | None, Tensor]] = {"heads": {}, "neurons": {}, "block": {}}
    for (kind, i), value in sums.items():
        parts[kind][i] = value.abs()
    return Scores(blocks.abs(), parts["heads"], parts["neurons"])


def _add_batch(model: Any, rows: list[dict[str, Any]], sums: dict[tuple[str, int], Tensor]) -> None:
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
    # The graph hangs on the pixels: a frozen teacher's weights have no gradient.
    pixels = pixels.to(model.device, model.dtype).requires_grad_(True)
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows]).to(model.device)
    labels = labels if labels.is_floating_point() else labels.long()
    with torch.enable_grad(), _watching(model) as seen:
        logits = getattr(model(pixel_values=pixels), "logits", None)
        if logits is None:
            raise ValueError(
                f"importance='first_order' needs a loss, and {type(model).__name__} has no classifier; type "
                "importance='uniform'."
            )
        if is_multi_label(model):
            losses = binary_cross_entropy(logits, labels)
        else:
            check_labels(labels, logits.shape[-1])
            losses = cross_entropy(logits, labels)
        gradients = torch.autograd.grad(losses.sum(), [activation for activation, _ in seen.values()])
    for (key, (activation, before)), gradient in zip(seen.items(), gradients, strict=True):
        output = activation if before is None else activation - before
        product = (output.detach() * gradient).double()
        if key[0] == "block":
            value = product.sum()
        else:
            value = product.flatten(0, -2).sum(0)
            value = value.unflatten(0, (-1, head_width(model.config))).sum(1) if key[0] == "heads" else value
        sums[key] = sums.get(key, torch.zeros_like(value)) + value


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[tuple[str, int], tuple[Tensor, Tensor | None]]]:
    """Inside: the outputs of each block (with its input), of its heads and of its neurons, in graphs."""
    seen: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
    handles = []
    one_width = isinstance(getattr(vision_config(model.config), "num_attention_heads", None), int)

    def block(key: tuple[str, int]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output), args[0].detach()

        return hook

    def entering(key: tuple[str, int]) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen[key] = args[0], None

        return hook

    for i, (_, module) in enumerate(find_blocks(model)):
        handles.append(module.register_forward_hook(block(("block", i))))
        for name, part in module.named_modules():
            if name.endswith(ATTENTION_OUT) and one_width:
                handles.append(part.register_forward_pre_hook(entering(("heads", i))))
            elif name.endswith(MLP_OUT) and not name.endswith("attention.output.dense"):
                handles.append(part.register_forward_pre_hook(entering(("neurons", i))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# The linear layers whose inputs are the heads' outputs and the neurons.
ATTENTION_OUT = ("o_proj", "out_proj", "attention.output.dense")
MLP_OUT = ("fc2", "down_proj", "output.dense", "weights_out")
