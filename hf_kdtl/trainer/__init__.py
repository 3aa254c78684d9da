"""Everything that hooks into transformers' Trainer."""

from hf_kdtl.trainer.trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]
