"""Table 5: rules that protect the task from a source that knows nothing. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.never_hurt_rules --dataset <cifar10> --teacher <ResNet> --work <folder>

A run is under one CPU minute. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.evidence.few_labels_many_images import shuffled
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import accuracy, labelled_rows, quiet, settings, small_bit, train
from benchmarks.evidence.views import Answers, Views, plain_split, pool
from hf_kdtl.data import load_images

STEPS, LABELS = 600, 50
LEARNING_RATES = {"adamw": (1e-3, 3e-3, 1e-2), "sgd": (0.03, 0.1, 0.3)}
RULES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "one_sided": {"name": "never_hurt", "form": "one_sided"},
    "orthogonal": {"name": "never_hurt", "form": "orthogonal"},
    "pcgrad": {"name": "pcgrad"},
}
ORDER = [("adamw", "shuffled", 10.0), ("adamw", "good", 10.0), ("adamw", "shuffled", 1.0), ("adamw", "good", 1.0)]
ORDER += [("sgd", source, weight) for _, source, weight in ORDER]


class NeverHurt:
    """One run. The table's `weight` is the learning rate of `alone`, and logit_kd's weight of the other arms."""

    def __init__(self, dataset: str, teacher: str, work: Path, images: int):
        data = load_images(dataset)
        self.pixels, self.labels, self.logits = pool(dataset, teacher, work, images)
        self.held_out = {name: plain_split(getattr(data, name), 32) for name in ("validation", "test")}
        self.rates: dict[str, float] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        optimizer, _, source = run.setting.partition("_")
        rate = run.weight if run.arm == "alone" else self.rates[optimizer]
        objectives: list[dict[str, Any]] = [{"name": "task"}]
        teacher = None
        if run.arm != "alone":
            objectives.append({"name": "logit_kd", "weight": run.weight, "temperature": 4.0})
            teacher = Answers(
                shuffled(self.logits, len(self.labels), run.seed) if source == "shuffled" else self.logits
            )
        further: dict[str, Any] = {"gradient_rule": RULES.get(run.arm), "objectives": objectives, "warmup_steps": 50}
        if optimizer == "sgd":
            further |= {"optim": "sgd", "weight_decay": 0.0}
        rows = labelled_rows(self.labels, LABELS, run.seed)
        student = small_bit(int(self.labels.max()) + 1, run.seed)
        images = Views(self.pixels, self.labels[rows], rows, None, run.seed)
        train(student, settings(run.seed, STEPS, rate, **further), images, teacher)
        return {"learning_rate": rate} | {name: accuracy(student, split) for name, split in self.held_out.items()}


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=len(ORDER), help="only so many of the cells, in the plan's order")
    parser.add_argument("--arms", nargs="+", default=[*RULES], choices=[*RULES])
    options = parser.parse_args()
    quiet()
    measure = NeverHurt(options.dataset, options.teacher, options.work, options.images)
    table, seeds = Table("never_hurt_rules", measure), range(1, options.seeds + 1)
    for optimizer, source, weight in ORDER[: options.first]:
        measure.rates[optimizer] = table.chosen(optimizer, "alone", LEARNING_RATES[optimizer], seeds)
        for seed in seeds:
            table.once(Run(optimizer, "alone", measure.rates[optimizer], seed))
            for arm in options.arms:
                table.once(Run(f"{optimizer}_{source}", arm, weight, seed))


if __name__ == "__main__":
    main()
