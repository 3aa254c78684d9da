"""Short paired runs, alone and distilled, with fewer labels and with all; what they say about a full training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from hf_kdtl.commands.common import runs, timing
from hf_kdtl.commands.common.experiment import Arm, Experiment
from hf_kdtl.commands.common.labels import SHARE
from hf_kdtl.commands.common.search_space import words
from hf_kdtl.commands.common.trials import RunLog, short_run
from hf_kdtl.evaluation.learning_curves import at_length, labels_worth
from hf_kdtl.evaluation.statistics import paired_difference
from hf_kdtl.objectives.entries import auto_ratio, entry_weight

SHARES = (0.25, 0.5, 1.0)  # of the labelled images
PARTS = (4, 2, 1)  # of a run, after which it is scored
ALONE, DISTILLED = "alone", "distilled"
SECOND = ("attention_transfer", "hidden_states", "relation")  # the first that fits is tried on top
LEVEL = 0.95


class Probe:
    """Runs of equal steps for every seed, share of the labels and arm, the seeds the same for all.

    Args:
        experiment: with its settings chosen for a short run.
        second: an objective to add to the distilled arm's, or "auto", or "none".
        log: where every run is a line.
        say: for a line of progress.
    """

    def __init__(self, experiment: Experiment, second: str, log: RunLog, say: Callable[[str], None]):
        self.experiment, self.log, self.say = experiment, log, say
        task = [entry | {"weight": 1.0} for entry in experiment.config.entries if entry["name"] == "task"]
        experiment.arms = {ALONE: Arm(task or runs.TASK, taught=False, unlabelled=False)}
        experiment.arms[DISTILLED] = Arm(experiment.config.entries)
        self._add_second(second)
        self._images = experiment.images
        self.lines: dict[tuple[str, float, int], dict[str, Any]] = {}

    def _add_second(self, second: str) -> None:
        # "auto" measures against the first entry that has a number: the heaviest.
        given = sorted(self.experiment.config.entries, key=lambda entry: -_number(entry))
        taken = {entry["name"] for entry in given}
        for name in [] if second == "none" else SECOND if second == "auto" else [second]:
            if name in taken:
                continue
            entries = [*given, {"name": name, "weight": {"auto": 0.5}}]
            self.experiment.arms[f"with {name}"] = Arm(entries)
            try:
                folder = self.experiment.folder
                runs.check_one_batch(self.experiment.trainer(f"with {name}", self.experiment.seeds[0], folder))
                return
            except ValueError as error:
                del self.experiment.arms[f"with {name}"]
                self.say(f"- {name} is left out: {error}")

    def steps_in(self, budget: float, least: int) -> int:
        """The steps of a run with which all runs take that many seconds."""
        paces = [timing.pace(make, self.experiment.config) for make in self.experiment.makers()]
        turns = len(self.experiment.seeds) * len(SHARES)
        evaluations = turns * len(PARTS) * sum(pace.evaluation for pace in paces)
        return timing.steps_within(budget, turns * sum(pace.step for pace in paces), evaluations, least)

    def labels(self) -> list[float]:
        """Labels a class, in the mean, of each share."""
        classes = len(self.experiment.data.label_names)
        return [len(self._rows(share)) / classes for share in SHARES]

    def _rows(self, share: float) -> np.ndarray:
        """Of each class the same share, at least one image; a smaller share is part of a larger one."""
        labels = np.array(self._images.labelled["label"][:])
        draw = np.random.default_rng(self.experiment.data_options.split_seed)
        of_class = [draw.permutation(np.flatnonzero(labels == index)) for index in np.unique(labels)]
        return np.sort(np.concatenate([rows[: max(1, round(share * len(rows)))] for rows in of_class]))

    def run(self) -> None:
        """Every run that is not in the log; a seed is complete before the next begins."""
        experiment, total = self.experiment, len(SHARES) * len(self.experiment.arms) * len(self.experiment.seeds)
        assert experiment.chosen is not None
        config = copy.copy(experiment.config)
        config.max_steps = steps = experiment.chosen.steps
        at = sorted({max(1, steps // part) for part in PARTS})
        for seed in experiment.seeds:
            for share in SHARES:
                self._take(share)
                for arm, this in experiment.arms.items():
                    name = f"{arm}-labels{share:g}-seed{seed}"
                    facts = {"arm": arm, "share": share, "seed": seed, "objectives": this.objectives, "steps": steps}
                    line = self.log.once(name, facts, partial(short_run, experiment, arm, seed, config, at))
                    if "failed" in line and arm in (ALONE, DISTILLED):
                        raise ValueError(f"{arm} does not train: {line['failed']}")
                    self.lines[arm, share, seed] = line
                    shown = line.get("failed") or f"{line['curve'][-1][1]:.1%}"
                    self.say(f"{len(self.lines)} of {total}: {arm}, {share:.0%} of the labels, seed {seed}: {shown}")
        self._take(1.0)

    def _take(self, share: float) -> None:
        """Train on this share of the labelled images, and on the same images without labels."""
        images = self._images
        labelled = images.labelled.select(self._rows(share))
        part = images.share
        if images.unlabelled is not None and self.experiment.options.labelled_share is None:
            part = max(SHARE, len(labelled) / (len(labelled) + len(images.unlabelled)))
        self.experiment.images = replace(images, labelled=labelled, share=part)

    # ---- What came out ----

    def scores(self, arm: str, full: int) -> list[list[float]]:
        """For each share of the labels every seed's accuracy, continued to `full` steps."""
        return [
            [min(1.0, max(0.0, at_length(self.lines[arm, share, seed]["curve"], full)))
             for seed in self.experiment.seeds] for share in SHARES
        ]  # fmt: skip

    def found(self, full: int) -> dict[str, Any]:
        """The section `probe` of results.json: scores, and each distilled arm minus alone with all labels.

        The interval holds for all arms together (95 %, Bonferroni), for the best of them is what is reported.
        """
        trained = [arm for arm in self.experiment.arms
                   if all("failed" not in line for (its, *_), line in self.lines.items() if its == arm)]  # fmt: skip
        scores = {arm: self.scores(arm, full) for arm in trained}
        level = 1 - (1 - LEVEL) / max(1, len(trained) - 1)
        gains = {arm: paired_difference(scores[arm][-1], scores[ALONE][-1], level) for arm in trained if arm != ALONE}
        best = max(gains, key=lambda arm: gains[arm]["mean"])
        alone = [fmean(found) for found in scores[ALONE]]
        return {
            "labels_per_class": self.labels(),
            "full_steps": full,
            "scores": scores,
            "gains": gains,
            "best": best,
            "objectives": self.experiment.arms[best].objectives,
            "equal_labels": labels_worth(self.labels(), alone, gains[best]["mean"]),
        }


def verdict(found: dict[str, Any]) -> str:
    """What a user reads: the gain with its interval, and what it equals in labels; or that none is to be expected."""
    gain, labels = found["gains"][found["best"]], found["labels_per_class"][-1]
    mean, interval = 100 * gain["mean"], gain["interval"]
    if interval is None:
        return f"The difference is {mean:+.1f} points, without an interval ({gain['note']}): nothing can be concluded."
    low, high = (100 * bound for bound in interval)
    if low < -100 or high > 100:
        return (
            f"The difference is {mean:+.1f} points, and the interval of {gain['number']} seeds is wider than accuracy "
            "itself: nothing can be concluded. More --seeds would tell."
        )
    shown = f"95 % interval [{low:+.1f}, {high:+.1f}], {gain['number']} seeds"
    if low > 0:
        return (
            f"Distillation is worth about {mean:+.1f} points of validation accuracy here ({shown}), with "
            f"{words(found['objectives'])}.{_in_labels(found['equal_labels'], labels)}"
        )
    if high < 1:
        return f"No gain is to be expected here: {mean:+.1f} points of validation accuracy ({shown})."
    return (
        f"No gain is shown: {mean:+.1f} points of validation accuracy ({shown}). It may be as much as {high:+.1f}; a "
        "larger --budget, or more --seeds, would tell."
    )


def _in_labels(more: float | None, labels: float) -> str:
    if more is None:
        return " More labels did not help the student alone in these runs, so it has no equal in labels."
    if more == float("inf"):
        return f" That equals more than 15 times the {labels:.0f} labels a class that there are."
    return f" That equals about {more:.0f} more labels a class (there are {labels:.0f})."


def _number(entry: dict[str, Any]) -> float:
    """The weight of an entry, 0 where it is measured."""
    return 0.0 if auto_ratio(entry) is not None else entry_weight(entry)
