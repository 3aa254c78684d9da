"""What of a model's outputs can be represented, and how it is read off a capture: the rows y of Bregman PCA."""

from __future__ import annotations

from torch import Tensor

from hf_kdtl.functional.attention import attention_rows, mean_heads
from hf_kdtl.functional.links import find
from hf_kdtl.functional.resample import precise
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import ModelGeometry

LINKS_OF = {
    "probabilities": ("softmax",),
    "pooled": ("identity", "tanh", "leaky_relu"),
    "hidden_states": ("identity",),
    "attention": ("softmax",),
}
"""What can be represented, and the links that fit it, the default first. tanh is for models with a tanh pooler."""
OF_BLOCK = ("hidden_states", "attention")


def check_of(of: str, layer: int | None, link: str | None = None) -> str:
    """The link for what is represented, after a look at whether these go together.

    Raises:
        ValueError: for an unknown `of`, a block where none is read or none where one is, a link that does not fit.
    """
    if of not in LINKS_OF:
        raise ValueError(f"of is {of!r}; expected {', '.join(map(repr, LINKS_OF))}.")
    block = type(layer) is int and layer >= 0
    if of in OF_BLOCK and not block:
        raise ValueError(f"layer is {layer!r}; {of} are of one block: give its number, counted from 0.")
    if of not in OF_BLOCK and layer is not None:
        raise ValueError(f"layer is {layer!r}; {of} are outputs of the model, not of a layer: leave layer out.")
    link = LINKS_OF[of][0] if link is None else find(link).name
    if link not in LINKS_OF[of]:
        raise ValueError(f"link is {link!r}; for {of} expected {' or '.join(map(repr, LINKS_OF[of]))}.")
    return link


def needs_of(of: str, layer: int | None) -> Needs:
    """What must be captured of the teacher for `outputs_of`."""
    blocks = frozenset({layer}) if layer is not None else frozenset()
    if of == "hidden_states":
        return Needs(hidden_states=blocks)
    if of == "attention":
        return Needs(attention=blocks)
    return Needs(logits=of == "probabilities", pooled=of == "pooled")


def width_of(of: str, layer: int | None, geometry: ModelGeometry) -> int:
    """The width d of the rows that a model of this geometry gives; 0 for probabilities, which it does not know.

    Raises:
        ValueError: when the model does not give such rows, saying what it gives.
    """
    name = geometry.name
    if layer is not None and layer >= len(geometry.layers):
        raise ValueError(f"{name} has the blocks 0 to {len(geometry.layers) - 1}, and {of} of block {layer} is asked.")
    if of == "pooled" and not geometry.pooled:
        raise ValueError(f"what the classifier of {name} reads could not be found; use of='probabilities'.")
    if of == "attention":
        assert layer is not None
        block = geometry.layers[layer]
        if block.attention != "full" or block.prefix[:1] != ("class",) or block.grid is None:
            raise ValueError(
                f"block {layer} of {name} has no class token that attends to every token; use of='hidden_states'."
            )
        return len(block.prefix) + block.grid[0] * block.grid[1]
    if of == "hidden_states":
        assert layer is not None
        return geometry.layers[layer].width
    return geometry.pooled if of == "pooled" else 0


def outputs_of(capture: Capture, of: str, layer: int | None) -> Tensor:
    """The outputs that are represented, in float32 or better: (B, d), or of hidden_states all tokens, (B, N, d).

    Args:
        of: "probabilities" softmax(z); "pooled" what the classifier reads; "hidden_states" the tokens of block
            `layer` (the cells of a map, row by row); "attention" the class token's attention to all tokens in block
            `layer`, mean over heads.
    """
    if of == "probabilities":
        return precise(capture.logits).softmax(-1)
    if of == "pooled":
        assert capture.pooled is not None
        return precise(capture.pooled)
    assert layer is not None
    if of == "hidden_states":
        hidden = precise(capture.hidden_states[layer])
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    found = capture.attention[layer]
    if found.weights is not None:
        rows = precise(found.weights[:, :, 0]).mean(1)
        return rows / rows.sum(-1, keepdim=True)
    assert found.query is not None and found.key is not None
    log_p = attention_rows(found.query, found.key, found.scale, found.bias, "cls")
    return mean_heads(log_p)[:, 0, 0].softmax(-1)  # of half precision too the sum is then 1
