"""Knowledge distillation and transfer learning for vision transformers, on the Hugging Face Trainer."""

from hf_kdtl.utils.versions import check

check()

from hf_kdtl.config import DistillationConfig  # noqa: E402
from hf_kdtl.models.student import make_student  # noqa: E402
from hf_kdtl.trainer.trainer import DistillationTrainer  # noqa: E402

__version__ = "0.1.0"
__all__ = ["DistillationConfig", "DistillationTrainer", "__version__", "make_student"]
