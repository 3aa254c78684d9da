"""Table 3: a student cut out of its teacher, and what it recovers. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.cut_and_recover --dataset <cifar10> --teacher <ViT> --work <folder>

A run is two and a half CPU minutes; the stored outputs are 2 GB. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.evidence.conv_guides_vit import KD, TASK
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.stored import StoredSet
from benchmarks.evidence.students import quiet, settings
from hf_kdtl import make_student
from hf_kdtl.models import Teacher

STEPS, MARKS = 500, (50, 100, 200, 300, 400, 500)
RATE = 5e-4  # what hf-kdtl distill takes for a student cut out of its teacher
TERMS = {
    "kd_hidden_states": {"name": "hidden_states"},
    "kd_attention_map": {"name": "attention_map", "layers": "last"},
}


class Recovered:
    """One run; every arm at the same learning rate, which is the table's `weight`."""

    def __init__(self, dataset: str, teacher: str, work: Path):
        self.teacher = Teacher.from_pretrained(teacher).classifier()
        config = make_student(self.teacher, 0.5).config.to_dict()
        student = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
        objectives = [*TASK, {"name": "logit_kd"}, *TERMS.values()]
        folder = work / "cut_and_recover"
        self.set = StoredSet(folder, dataset, teacher, student, objectives, each=1000, views=2, on_the_way=5)

    def __call__(self, run: Run) -> dict[str, Any]:
        objectives = [*(TASK if run.arm == "labels" else KD)]
        if run.arm in TERMS:
            objectives.append(TERMS[run.arm])
        config = settings(
            run.seed, STEPS, run.weight, objectives=objectives, per_device_train_batch_size=32, warmup_steps=25
        )
        return self.set.trained(make_student(self.teacher, 0.5), config, MARKS)


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument(
        "--arms", nargs="+", default=["kd", "kd_hidden_states", "labels"], choices=["kd", "labels", *TERMS]
    )
    options = parser.parse_args()
    quiet()
    table = Table("cut_and_recover", Recovered(options.dataset, options.teacher, options.work))
    for seed in range(1, options.seeds + 1):
        for arm in options.arms:
            table.once(Run("depth_half", arm, RATE, seed))


if __name__ == "__main__":
    main()
