"""Table 7: importing a Bregman representation beside soft labels. The plan stands in benchmarks/plan.md.

    python -m benchmarks.evidence.bregman_hint --dataset <tiny_imagenet100> --teacher <its teacher> --work <folder>

A run is under one CPU minute. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.evidence.conv_guides_vit import KD
from benchmarks.evidence.runs import Run, Table, arguments
from benchmarks.evidence.stored import StoredSet
from benchmarks.evidence.students import SMALL_BIT, quiet, settings, small_bit
from hf_kdtl.commands.fit_representation import main as fit_representation
from hf_kdtl.models.bregman.layer import BregmanLayer

STEPS, MARKS = 1000, (50, 100, 200, 400, 700, 1000)
RATE = 3e-3
HINT = {"name": "hidden_states", "layers": "last"}
REPRESENTED = {  # arm -> what is represented, and by how many directions
    "kd_bregman_4": ("probabilities", 4), "kd_bregman_16": ("probabilities", 16),
    "kd_bregman_32": ("probabilities", 32), "kd_bregman_pooled_16": ("pooled", 16),
}  # fmt: skip
WEIGHTS = {"kd": (0.9, 3.0)} | dict.fromkeys(("kd_hint", *REPRESENTED), (0.3, 3.0))


class Imported:
    """One run. `weight` is that of logit_kd for `kd`, of the hint, or of the bregman term in units of 1 / baseline."""

    def __init__(self, dataset: str, teacher: str, work: Path):
        self.folder, self.teacher, self.kd = work / "bregman_hint", teacher, 0.9
        # A bregman term of probabilities reads logits, one of pooled features the embedding.
        objectives = [{"name": "task"}, {"name": "logit_kd"}, HINT, {"name": "feature_kd", "patch_weight": 0}]
        config = {"model_type": "bit", **SMALL_BIT}
        self.set = StoredSet(self.folder, dataset, teacher, config, objectives, each=100, teacher_pixels="own")

    def __call__(self, run: Run) -> dict[str, Any]:
        objectives = [dict(entry) for entry in KD]
        objectives[1]["weight"] = run.weight if run.arm == "kd" else self.kd
        if run.arm == "kd_hint":
            objectives.append(HINT | {"weight": run.weight})
        elif run.arm != "kd":
            folder, unit = self.represented(*REPRESENTED[run.arm])
            objectives.append({"name": "bregman", "representation": folder, "weight": run.weight * unit})
        student = small_bit(len(self.set.names), run.seed)
        student.config.id2label = dict(enumerate(self.set.names))
        return self.set.trained(student, settings(run.seed, STEPS, RATE, objectives=objectives), MARKS)

    def represented(self, of: str, k: int) -> tuple[str, float]:
        """The folder of a representation of the teacher, fitted on the training images, and 1 / its baseline."""
        folder = str(self.folder / f"{of}_{k}")
        if not Path(folder, "representation.json").is_file():
            fit_representation(
                ["--teacher", self.teacher, "--dataset", self.set.saved, "--of", of, "--k", str(k), "--output_dir",
                 folder]
            )  # fmt: skip
        return folder, 1 / BregmanLayer.load(folder).representation.baseline


def main() -> None:
    parser = arguments(__doc__, "dataset", "teacher")
    parser.add_argument("--arms", nargs="+", default=["kd_hint", "kd_bregman_16", "kd_bregman_pooled_16"])
    options = parser.parse_args()
    quiet()
    measure = Imported(options.dataset, options.teacher, options.work)
    table, seeds = Table("bregman_hint", measure), range(1, options.seeds + 1)
    measure.kd = table.chosen("tiny_imagenet100", "kd", WEIGHTS["kd"], seeds)
    for arm in ("kd", *options.arms):
        table.taken("tiny_imagenet100", arm, WEIGHTS[arm], seeds)


if __name__ == "__main__":
    main()
