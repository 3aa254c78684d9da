"""Table 5, the rule layer_local: terms on pairs of layers, of a source that knows nothing. The plan stands in
benchmarks/plan.md.

    python -m benchmarks.evidence.never_hurt_layers --teacher <the demo's teacher>

A run is about ten CPU seconds. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from typing import Any

from transformers import ViTForImageClassification, set_seed

from benchmarks.evidence.cut_and_recover import RATES, TERMS, OnDigits
from benchmarks.evidence.never_hurt_rules import RULES
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.students import quiet
from hf_kdtl.models import Teacher

LABELS, WEIGHT = 5, 10.0
ARMS: dict[str, dict[str, Any] | None] = RULES | {"layer_local": {"name": "layer_local"}}
SOURCES = ("random", "good")


class NeverHurtLayers(OnDigits):
    """One run. The table's `weight` is the learning rate of `alone`, and that of hidden_states for the other arms."""

    def __call__(self, run: Run) -> dict[str, Any]:
        if run.arm == "alone":
            return self.trained(run.seed, LABELS, run.weight, [{"name": "task"}], None)
        source = self.teacher if run.setting.endswith("good") else self._random(run.seed)
        objectives = [{"name": "task"}, TERMS["kd_hidden_states"] | {"weight": run.weight}]
        rate = self.rates["digits"]
        return self.trained(run.seed, LABELS, rate, objectives, source, gradient_rule=ARMS[run.arm])

    def _random(self, seed: int) -> Teacher:
        """A source that knows nothing: the teacher's architecture with random weights."""
        set_seed(1000 + seed)
        return Teacher(ViTForImageClassification(self.teacher.model.config), self.teacher.processing_class)


def main() -> None:
    options = arguments(__doc__, "teacher").parse_args()
    quiet()
    measure = NeverHurtLayers(options.teacher)
    table, seeds = Table("never_hurt_rules", measure), range(1, options.seeds + 1)
    measure.rates["digits"] = table.chosen("digits", "alone", RATES, seeds)
    for seed in seeds:
        table.once(Run("digits", "alone", measure.rates["digits"], seed))
        for source in SOURCES:
            for arm in ARMS:
                table.once(Run(f"digits_{source}", arm, WEIGHT, seed))


if __name__ == "__main__":
    main()
