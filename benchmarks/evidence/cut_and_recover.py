"""Table 3: a student cut out of its teacher, and what it recovers. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.cut_and_recover --dataset <cifar10> --teacher <ViT> --work <folder>

A run is one and a half CPU minutes; the stored outputs are 4 GB. Stopped and started again it goes on where it was.
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
LEARNING_RATES, WEIGHTS = (5e-4, 1e-3), (1.0, 10.0)
TERMS = {
    "kd_hidden_states": {"name": "hidden_states"},
    "kd_attention_map": {"name": "attention_map", "layers": "last"},
}


class Recovered:
    """One run. The table's `weight` is the learning rate of `labels` and `kd`, of others their term's weight."""

    def __init__(self, dataset: str, teacher: str, work: Path):
        self.teacher, self.rate = Teacher.from_pretrained(teacher).classifier(), 0.0
        config = make_student(self.teacher, 0.5).config.to_dict()
        student = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
        objectives = [*TASK, {"name": "logit_kd"}, *TERMS.values()]
        folder = work / "cut_and_recover"
        self.set = StoredSet(folder, dataset, teacher, student, objectives, each=1000, views=2, on_the_way=5)

    def __call__(self, run: Run) -> dict[str, Any]:
        term, rate = TERMS.get(run.arm), self.rate
        objectives = [*(TASK if run.arm == "labels" else KD)]
        if term is None:
            rate = run.weight
        else:
            objectives.append(term | {"weight": run.weight})
        config = settings(
            run.seed, STEPS, rate, objectives=objectives, per_device_train_batch_size=32, warmup_steps=25
        )
        return {"learning_rate": rate} | self.set.trained(make_student(self.teacher, 0.5), config, MARKS)


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--arms", nargs="+", default=["kd_hidden_states"], choices=[*TERMS])
    options = parser.parse_args()
    quiet()
    measure = Recovered(options.dataset, options.teacher, options.work)
    table, seeds = Table("cut_and_recover", measure), range(1, options.seeds + 1)
    measure.rate = table.chosen("depth_half", "kd", LEARNING_RATES, seeds)
    for arm, tried in [("kd", LEARNING_RATES), *((arm, WEIGHTS) for arm in options.arms), ("labels", LEARNING_RATES)]:
        table.taken("depth_half", arm, tried, seeds)


if __name__ == "__main__":
    main()
