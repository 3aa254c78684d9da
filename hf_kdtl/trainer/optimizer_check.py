"""Whether an optimizer moves what is to be trained."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from hf_kdtl.config import DistillationConfig
from hf_kdtl.trainer.distiller import Distiller

logger = logging.get_logger(__name__)


def check_optimizer(optimizer: Any, distiller: Distiller, args: DistillationConfig) -> None:
    """Refuse an optimizer without the student's or the objectives' parameters, and give it the layers' rates.

    Raises:
        ValueError: with an alternative.
    """
    rates, held = distiller.rates, {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [n for n, p in distiller.objectives.named_parameters() if p.requires_grad and id(p) not in held]
    trained = {n: id(p) for n, p in distiller.student.named_parameters() if p.requires_grad}
    resting = [n for n, own in trained.items() if own not in held]
    inside = any(word in str(args.optim).lower() for word in ("layerwise", "lomo"))  # it steps elsewhere
    if resting and not inside and len(resting) == len(trained):
        raise ValueError(
            f"the optimizer holds none of the student's {len(trained)} trainable tensors (such as {resting[0]}), so "
            "nothing would move. It was made of another model, or before a layer was replaced or adapters were added: "
            "make it of student.parameters() after that, or let the trainer make it (optim=...)."
        )
    if resting and not inside:
        logger.warning(
            f"the optimizer does not hold {len(resting)} of the student's {len(trained)} trainable tensors, which "
            f"stay as they are: {', '.join(resting[:4])}{' ...' if len(resting) > 4 else ''}. If so meant, freeze "
            "them (requires_grad_(False)); otherwise make it of student.parameters()."
        )
    if left:
        raise ValueError(
            f"the optimizer does not hold the objectives' parameters {left[:3]}, so they would not be trained. Build "
            "it from trainer.distiller.parameters(), or let the trainer make it (optim=...)."
        )
    if rates is not None:
        rates.apply(optimizer)
