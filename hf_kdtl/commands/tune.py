"""Search objectives, weights, temperature and learning rate on your images and models, within a time.

  hf-kdtl tune --teacher runs/teacher/model --dataset my_images --student_flops 0.5 --output_dir runs/tune \\
      --budget 30min

It takes the settings of hf-kdtl distill, and scores on validation alone. Of every three trials one goes on from each
rung (successive halving); those that stay are trained with all seeds. It leaves best.yaml (for hf-kdtl distill
--config), tune.md, tune.png and runs.jsonl, a line a run: --resume_from_checkpoint true continues.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import runs, timing
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Arm, Experiment
from hf_kdtl.commands.common.next_command import command
from hf_kdtl.commands.common.search_space import SearchSpace, words
from hf_kdtl.commands.common.searches import begin, open_experiment, printed, typed_settings
from hf_kdtl.commands.common.trials import RUNS, RunLog
from hf_kdtl.commands.common.tuning import HALVING, RUNGS, Tuning, check_optuna
from hf_kdtl.evaluation.results import update_results
from hf_kdtl.reports.figures.tuning import TUNING, tuning_figure
from hf_kdtl.utils.options import check_option
from hf_kdtl.utils.text import escape_markdown, markdown_table

FEW = 9  # trials, of which one would go on to the end
FULL_RUNS = 12  # complete runs that fit into the budget, in which about 40 trials go


@dataclass
class TuneOptions:
    """How long to search, and among what."""

    budget: str = field(default="30min", metadata={"help": "Of all trials: 30min, 2h."})
    max_trials: int | None = field(default=None, metadata={"help": "Stop after this many."})
    candidates: list[str] = field(
        default_factory=lambda: ["logit_kd", "attention_transfer", "hidden_states", "jacobian"],
        metadata={"help": "Objectives to try."},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, run the trials, write best.yaml, the table and the picture."""
    cli.quiet()
    types = (TuneOptions, DistillOptions, DataOptions, DistillationConfig)
    own, options, data_options, config = cli.parse(*types, argv=argv, doc=__doc__)
    typed = cli.typed_names(*types, argv=argv)
    check_optuna()
    SearchSpace.of(own.candidates, config.learning_rate)
    check_option("tune", "max_trials", own.max_trials, own.max_trials is None or own.max_trials > 0, "1 or more")
    experiment, budget = open_experiment("tune", own, options, data_options, config, typed)

    def fitting() -> int:
        pace = timing.pace(experiment.makers()[0], config)
        evaluations = FULL_RUNS * len(RUNGS) * pace.evaluation
        return timing.steps_within(budget, FULL_RUNS * pace.step, evaluations, HALVING**2)

    full = begin(experiment, "tune", own, fitting)
    assert experiment.chosen is not None
    shorter = f" (training would be {full:,})" if experiment.chosen.steps < full else ""
    printed(f"A complete trial has {experiment.chosen.steps:,} steps{shorter}; seeds {experiment.seeds}.")
    tuning = Tuning(experiment, fitting_space(experiment, own.candidates), RunLog(experiment.folder / RUNS), printed)
    tuning.run(budget, own.max_trials)
    printed(finish(tuning, best_settings(tuning, typed)))


def fitting_space(experiment: Experiment, candidates: list[str]) -> SearchSpace:
    """What can be tried with this pair of models; the others are named with the reason."""
    fitting = []
    for name in candidates:
        experiment.arms["candidate"] = Arm([{"name": "task"}, {"name": name}])
        try:
            runs.check_one_batch(experiment.trainer("candidate", experiment.seeds[0], experiment.folder))
            fitting.append(name)
        except ValueError as error:
            printed(f"- {name} is left out: {error}")
    return SearchSpace.of(fitting, experiment.config.learning_rate)


def best_settings(tuning: Tuning, typed: set[str]) -> dict[str, Any]:
    """Settings for hf-kdtl distill: those that were typed, and the best trial's."""
    experiment, best = tuning.experiment, tuning.complete[0]
    found = {"objectives": best.objectives, "learning_rate": best.learning_rate, "seeds": experiment.seeds}
    return (
        typed_settings(experiment, typed) | found | {"baseline": True, "output_dir": str(experiment.folder / "best")}
    )


def finish(tuning: Tuning, settings: dict[str, Any]) -> str:
    """Write what was found; returns the text for the terminal."""
    folder, best, typed = tuning.experiment.folder, tuning.complete[0], tuning.trials[0]
    about = (
        f"# The settings of trial {best.number}, the best of {len(tuning.trials)} by validation accuracy "
        f"({best.mean:.1%}, mean of {len(best.scores)} seeds; as typed {typed.mean:.1%}).\n"
        f"# Trials had {tuning.steps} steps. hf-kdtl distill chooses its own length, and measures on test images.\n"
    )
    path = folder / "best.yaml"
    path.write_text(about + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    finished = {trial.number for trial in tuning.complete}
    curves = {trial.number: trial.curve for trial in tuning.trials if trial.curve}
    tuning_figure(curves, finished, best.number, folder / TUNING)
    trials = [vars(trial) for trial in tuning.trials]
    update_results(folder, "tune", {"trials": trials, "best": best.number, "gain": tuning.gain()})
    text = table(tuning)
    (folder / "tune.md").write_text(f"# Settings tried\n\n{text}\n\n![trials]({TUNING})\n", encoding="utf-8")
    if tuning.out_of_time and len(tuning.trials) < FEW:
        text += f"\n\nFewer than {FEW} trials fitted: a larger --budget continues, with --resume_from_checkpoint true."
    return f"\n{text}\n\nThe best settings are in {path}. Next:\n\n  {command('distill', config=path)}"


def table(tuning: Tuning, most: int = 8) -> str:
    """The best complete trials, what was typed, and what the difference is worth."""
    shown = tuning.complete[:most]
    shown += [] if tuning.trials[0] in shown else [tuning.trials[0]]
    rows = [["trial", "objectives", "rate", "validation"]]
    rows += [
        [f"{t.number}{'' if t.number else ' (as typed)'}", escape_markdown(words(t.objectives)),
         f"{t.learning_rate:g}", f"{t.mean:.1%}"] for t in shown
    ]  # fmt: skip
    failed, gain = sum(bool(t.failed) for t in tuning.trials), tuning.gain()
    stopped = len(tuning.trials) - len(tuning.complete) - failed
    found = gain["interval"]
    interval = "" if found is None else f", 95 % interval [{100 * found[0]:+.1f}, {100 * found[1]:+.1f}]"
    return (
        f"{markdown_table(rows)}\n\n{len(tuning.trials)} trials, {stopped} stopped early, {failed} failed. The best "
        f"minus as typed, {gain['number']} seeds: {100 * gain['mean']:+.1f} points{interval}. It was chosen by these "
        "images, so its own figure is too high: hf-kdtl distill measures it on test images."
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
