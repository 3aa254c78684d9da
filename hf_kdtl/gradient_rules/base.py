"""The interface of a gradient rule, which combines the task gradient and the transfer gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_kdtl.functional.surgery import Conflict, Gradient, Products
from hf_kdtl.utils import options


class GradientRule:
    """Combines two gradients into one. Subclass it, and add a line to `GRADIENT_RULES`.

    The two are complete: of all micro-batches and processes of an optimizer step. The rule's result is then clipped
    and passed to the optimizer. The constructor takes keyword-only options, checks their values, and never takes
    **kwargs.
    """

    name: str = ""
    """Its key in `GRADIENT_RULES`."""
    local: bool = False
    """True: each pair of layers moves its own block only; see `LayerLocal`."""
    citation: str = ""
    """BibTeX of the paper, for the model card."""

    def combine(
        self, task: Gradient, transfer: Gradient, products: Sequence[Products], epoch: int
    ) -> list[Tensor | None]:
        """The gradient the optimizer gets: one tensor a parameter, None where both are None.

        Args:
            task: g. Not modified; a tensor of it may be returned.
            transfer: d. May be overwritten.
            products: `surgery.inner_products` of the two.
            epoch: completed epochs, from 0.
        """
        raise NotImplementedError

    def conflict(self, products: Sequence[Products], epoch: int) -> Conflict:
        """How far the two conflict and what the rule removes, for the log."""
        raise NotImplementedError


def check_option(rule: str, option: str, value: Any, valid: bool, expected: str) -> None:
    """`hf_kdtl.utils.options.check_option` of a gradient rule, by name."""
    options.check_option(f"gradient_rule {rule!r}", option, value, valid, expected)


def check_word(rule: str, option: str, value: Any, words: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the words."""
    check_option(rule, option, value, value in words, " or ".join(map(repr, words)))
