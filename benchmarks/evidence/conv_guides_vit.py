"""Table 2: a conv teacher guides a ViT from random weights. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.conv_guides_vit --dataset <cifar10> --teacher <ResNet> --work <folder>

A run is about one and a half CPU minutes. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ViTConfig, ViTForImageClassification, set_seed

from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.stored import StoredSet
from benchmarks.evidence.students import quiet, settings

STUDENT: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 32,
    "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
"""16 patches of 8 px, as many as the cells of the ResNet's third stage at 64 px."""

STEPS, MARKS = 1000, (100, 250, 500, 750, 1000)
LEARNING_RATES = (1e-3, 2e-3)
TASK = [{"name": "task"}]
KD = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}]
HINT = {"name": "hidden_states", "layers": [[3, 5]], "weight": 2.5}
ARMS = {
    "alone": TASK, "logit_kd": KD, "both": [*KD, HINT], "hidden_states": [*TASK, HINT],
    "both_auto": [*KD, HINT | {"weight": "auto"}],
    "both_auto_kd_first": [KD[1], KD[0], HINT | {"weight": "auto"}],
}  # fmt: skip


class Guided:
    """One run: an arm, a learning rate (the table's `weight`), a seed."""

    def __init__(self, dataset: str, teacher: str, work: Path):
        config = {"model_type": "vit", **STUDENT}
        self.set = StoredSet(
            work / "conv_guides_vit", dataset, teacher, config, [*TASK, {"name": "logit_kd"}, HINT], each=1000
        )

    def __call__(self, run: Run) -> dict[str, Any]:
        set_seed(run.seed)
        student = ViTForImageClassification(ViTConfig(**STUDENT, id2label=dict(enumerate(self.set.names))))
        return self.set.trained(student, settings(run.seed, STEPS, run.weight, objectives=ARMS[run.arm]), MARKS)


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--arms", nargs="+", default=["alone", "logit_kd", "both"], choices=[*ARMS])
    options = parser.parse_args()
    quiet()
    table = Table("conv_guides_vit", Guided(options.dataset, options.teacher, options.work))
    for arm in options.arms:
        table.taken("cifar10_10000", arm, LEARNING_RATES, range(1, options.seeds + 1))


if __name__ == "__main__":
    main()
