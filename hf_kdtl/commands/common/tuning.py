"""A search by optuna with successive halving, whose runs are lines of a file: reading them again continues it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from hf_kdtl.commands.common.experiment import Arm, Experiment
from hf_kdtl.commands.common.search_space import SearchSpace, words
from hf_kdtl.commands.common.trials import Curve, RunLog, short_run
from hf_kdtl.evaluation.statistics import paired_difference

HALVING = 3  # one of three trials goes on from each rung
RUNGS = (HALVING**2, HALVING, 1)  # parts of a complete trial
STARTUP = 8  # trials that are drawn at random, before the sampler models what came out


@dataclass
class Trial:
    """One choice of settings, and what came out: validation accuracy by seed, at the end of complete runs."""

    number: int
    objectives: list[dict[str, Any]]
    learning_rate: float
    curve: Curve = field(default_factory=list)  # of the first seed
    scores: dict[int, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def mean(self) -> float:
        """Accuracy, mean over the seeds."""
        return fmean(self.scores.values())

    def __str__(self) -> str:
        what = f"trial {self.number}: {words(self.objectives)}, rate {self.learning_rate:g}"
        if self.failed:
            return f"{what}: failed, {self.failed}"
        if not self.scores:
            step, accuracy = self.curve[-1]
            return f"{what}: {accuracy:.1%} at step {step:.0f}, stopped"
        return f"{what}: {self.mean:.1%}, {len(self.scores)} seeds"


class Tuning:
    """Trials of equal steps. After a ninth and a third of them the worse two thirds stop; those that stay to the end
    are trained with all seeds, the same for every trial. Trial 0 is what was typed, and always complete.

    A trial depends on those before it and on nothing else, so that reading the finished runs of the log again leads
    to the same search.

    Args:
        experiment: with its settings chosen for complete trials.
        log: where every run is a line.
        say: for a line about each trial.
    """

    def __init__(self, experiment: Experiment, space: SearchSpace, log: RunLog, say: Callable[[str], None]):
        check_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        assert experiment.chosen is not None
        self.experiment, self.space, self.log, self.say = experiment, space, log, say
        self.steps, self.seeds = experiment.chosen.steps, experiment.seeds
        self.rungs = sorted({max(1, self.steps // part) for part in RUNGS})
        self.trials: list[Trial] = []
        self.out_of_time = False  # whether the budget ended the search
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=HALVING)
        self._study = optuna.create_study(direction="maximize", pruner=pruner)

    def run(self, budget: float, most: int | None) -> None:
        """Trials until the next would exceed the budget of seconds, or there are `most`; trial 0 in any case."""
        while most is None or len(self.trials) < most:
            if self.trials and sum(map(self._seconds, self.trials)) + self._expected() > budget:
                self.out_of_time = True
                return
            self.say(str(self._trial()))

    def _seconds(self, trial: Trial) -> float:
        names = [f"trial{trial.number}-seed{seed}" for seed in self.seeds]
        return sum(self.log.lines[name]["seconds"] for name in names if name in self.log.lines)

    def _expected(self) -> float:
        """Seconds of the next trial: the mean of those before; of the first, one that stops at the second rung."""
        if len(self.trials) > 1:
            return fmean(map(self._seconds, self.trials[1:]))
        return self._seconds(self.trials[0]) / len(self.seeds) / HALVING

    def _trial(self) -> Trial:
        import optuna

        number = len(self.trials)
        self._study.sampler = optuna.samplers.TPESampler(seed=self.seeds[0] + number, n_startup_trials=STARTUP)
        asked, config = self._study.ask(), self.experiment.config
        entries, rate = self.space.suggest(asked) if number else (config.entries, config.learning_rate)
        trial = Trial(number, entries, rate)
        self.trials.append(trial)
        decided: dict[float, bool] = {}

        def stop(step: float, accuracy: float) -> bool:
            if step not in decided:  # a run that was just made has asked before
                asked.report(accuracy, HALVING ** self.rungs.index(int(step)))
                decided[step] = step < self.steps and asked.should_prune() and number > 0
            return decided[step]

        stopped = False
        for seed in self.seeds:
            line = self._line(trial, seed, stop if seed == self.seeds[0] else lambda step, accuracy: False)
            trial.failed = line.get("failed", "")
            if seed == self.seeds[0]:
                trial.curve = line["curve"]
                stopped = any([stop(*point) for point in trial.curve])  # each: one from the log reports them here
            if trial.failed or stopped:
                break
            trial.scores[seed] = line["curve"][-1][1]
        state = optuna.trial.TrialState
        if trial.failed and not number:
            raise ValueError(f"the settings as typed do not train: {trial.failed}")
        if trial.failed or stopped:
            trial.scores = {}
            self._study.tell(asked, state=state.FAIL if trial.failed else state.PRUNED)
        else:
            self._study.tell(asked, trial.mean)
        return trial

    def _line(self, trial: Trial, seed: int, stop: Callable[[int, float], bool]) -> dict[str, Any]:
        config = copy.copy(self.experiment.config)
        config.learning_rate, config.max_steps = trial.learning_rate, self.steps
        arm = f"trial{trial.number}"
        self.experiment.arms[arm] = Arm(trial.objectives)
        facts = {"trial": trial.number, "seed": seed, "objectives": trial.objectives, "steps": self.steps,
                 "learning_rate": trial.learning_rate}  # fmt: skip
        run = lambda: short_run(self.experiment, arm, seed, config, self.rungs, stop)  # noqa: E731
        return self.log.once(f"{arm}-seed{seed}", facts, run)

    @property
    def complete(self) -> list[Trial]:
        """The trials with all seeds, the best first."""
        return sorted((trial for trial in self.trials if trial.scores), key=lambda trial: -trial.mean)

    def gain(self) -> dict[str, Any]:
        """The best trial minus what was typed, paired by seed."""
        best, typed = self.complete[0], self.trials[0]
        return paired_difference([*best.scores.values()], [*typed.scores.values()])


def check_optuna() -> None:
    """Raises ValueError where optuna is not installed."""
    if find_spec("optuna") is None:
        raise ValueError("optuna not found; the search needs it. Type: pip install 'hf_kdtl[tune]'.")
