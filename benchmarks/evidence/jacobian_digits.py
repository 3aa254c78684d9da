"""Table 4a: Jacobian matching on the digits. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.jacobian_digits --teacher <the demo's teacher> --work runs/evidence

A run is about 5 CPU seconds. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.auto_weight import OBJECTIVES, RATES, Runs
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import quiet

WEIGHTS = (0.1, 1.0, 10.0, 100.0)
ARMS = {"kd": ["logit_kd"], "jacobian": ["jacobian"], "kd_jacobian": ["jacobian"]}


class Jacobian:
    """One run. The table's `weight` is the learning rate of `alone`, and the weight of the arm's own term."""

    def __init__(self, teacher: str, work: Path):
        self.teacher, self.work, self.runs = teacher, work, {}
        self.rate: dict[str, float] = {}
        self.kd: dict[str, float] = {}

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.setting not in self.runs:
            self.runs[run.setting] = Runs(run.setting, "digits", self.teacher, self.work)
        terms = [OBJECTIVES[name] | {"weight": run.weight} for name in ARMS.get(run.arm, [])]
        if run.arm == "kd_jacobian":
            terms.append(OBJECTIVES["logit_kd"] | {"weight": self.kd[run.setting]})
        rate = self.rate.get(run.setting, run.weight) if terms else run.weight
        found = self.runs[run.setting].trained(terms, rate, run.seed)
        return {"learning_rate": rate, "validation": found["validation"], "test": found["test"]}


def main() -> None:
    options = arguments(__doc__, "teacher").parse_args()
    quiet()
    measure = Jacobian(options.teacher, options.work)
    table, seeds = Table("jacobian_digits", measure), range(1, options.seeds + 1)
    for setting in ("digits_20", "digits_5"):
        table.taken(setting, "alone", RATES, seeds)
        measure.rate[setting] = table.chosen(setting, "alone", RATES, seeds)
        for arm in ARMS:
            table.taken(setting, arm, WEIGHTS, seeds)
            if arm == "kd":
                measure.kd[setting] = table.chosen(setting, arm, WEIGHTS, seeds)


if __name__ == "__main__":
    main()
