"""Knowledge distillation and transfer learning for vision transformers, on the Hugging Face Trainer."""

from hf_kdtl.config import DistillationConfig
from hf_kdtl.models.student import make_student
from hf_kdtl.trainer import DistillationTrainer

__version__ = "0.1.0"
__all__ = ["DistillationConfig", "DistillationTrainer", "__version__", "make_student"]
