"""Several runs side by side, paired by seed: read from their results.json, and compared only where they can be."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_kdtl.evaluation.predictions import read_predictions
from hf_kdtl.evaluation.results import FILE, read_results, same_value
from hf_kdtl.evaluation.statistics import holm, images_difference, paired_difference


@dataclass(frozen=True)
class Arm:
    """One model of a run folder, trained with one or several seeds.

    Args:
        name: the folder as it was typed, and the model's name in results.json ("alone", "distilled").
        data: the section `data` of its results.json.
        runs: {seed: {split: {metric: value}}}.
        folders: {seed: the folder of that run}.
    """

    name: str
    data: dict[str, Any]
    runs: dict[str, dict[str, dict[str, float]]]
    folders: dict[str, Path]

    def values(self, split: str, metric: str) -> list[float]:
        """One value for each seed, in the order of the seeds.

        Raises:
            ValueError: when a seed has no such split or metric, or no finite value of it.
        """
        values = []
        for seed in self.seeds:
            found = self.runs[seed].get(split)
            if found is None:
                raise ValueError(f"{self.name} has no split {split!r}; expected one of {', '.join(self.runs[seed])}.")
            if found.get(metric) is None:
                known = ", ".join(name for name, value in found.items() if value is not None)
                raise ValueError(f"{self.name}, seed {seed}, has no {metric!r} on {split}; it has {known}.")
            values.append(found[metric])
        return values

    @property
    def seeds(self) -> list[str]:
        return sorted(self.runs, key=int)


def read_arms(given: str) -> list[Arm]:
    """The trained models of a run folder; of `<folder>/<name>` the one of that name.

    Raises:
        FileNotFoundError: when neither is a run folder.
        ValueError: when it was not evaluated yet, holds no such model, or is of another schema.
    """
    path = Path(given).expanduser()
    if not (path / FILE).is_file() and (path.parent / FILE).is_file():
        folder, only, shown = path.parent, path.name, str(Path(given).parent)
    else:
        folder, only, shown = path, None, str(Path(given))
    results = read_results(folder)
    models = results.get("evaluation", {}).get("models", {})
    # The teacher of hf-kdtl distill and the models of hf-kdtl evaluate have no seed: they were not trained there.
    trained = {name: model["runs"] for name, model in models.items() if all(map(str.isdecimal, model["runs"]))}
    if not trained:
        raise ValueError(
            f"{shown} holds no evaluated model with a seed; expected the output_dir of distill or train-teacher "
            "after its end (continue it with --resume_from_checkpoint true)."
        )
    if only is not None and only not in trained:
        raise ValueError(f"{shown} holds no model {only!r}; expected one of {', '.join(trained)}.")
    chosen = {name: runs for name, runs in trained.items() if only in (None, name)}
    return [
        Arm(f"{shown}/{name}", results.get("data", {}), runs, {k: folder / f"{name}-seed{k}" for k in runs})
        for name, runs in chosen.items()
    ]


def check_comparable(arms: Sequence[Arm], split: str) -> None:
    """Whether a difference between these would be one between models, and not between their data.

    Raises:
        ValueError: naming two of them and what differs: data set, classes, how it was split, number of images, seeds;
            also for fewer than two, or the same one twice.
    """
    names = [arm.name for arm in arms]
    if len(arms) < 2 or len(set(names)) < len(names):
        raise ValueError(f"found {', '.join(names) or 'no model'}; expected two different ones or more.")
    first, *others = arms
    mine = _facts(first, split)
    for arm in others:
        for what, its in _facts(arm, split).items():
            own = mine.get(what, its)
            same = same_value if what == "data set" else operator.eq
            if not same(its, own):
                found = [f"{of.name} has {_in_words(x, y)}" for of, x, y in ((first, own, its), (arm, its, own))]
                raise ValueError(f"{what}: {' and '.join(found)}; {_ADVICE.get(what, _ADVICE['data'])}.")


_ADVICE = {
    "seeds": "add the missing --seeds to its recipe, with --resume_from_checkpoint true",
    "data": "only runs on the same data can be compared",
}


def _facts(arm: Arm, split: str) -> dict[str, Any]:
    data = arm.data
    known = data.get("digests", {}).get(split)  # results of earlier versions have none
    return {
        "data set": data.get("source"),
        "classes": set(data.get("classes", [])),
        "way of splitting": data.get("splits"),
        f"{split} images": data.get("sizes", {}).get(split),
        "seeds": arm.seeds,
    } | ({} if known is None else {f"hash of the {split} images": known})


def _in_words(fact: Any, other: Any) -> str:
    """A fact in words; of classes, which may be a thousand, those that the other has not."""
    if isinstance(fact, set):
        own = sorted(fact - other)
        return f"{len(fact)} classes ({', '.join(own[:5]) or 'none'}{' ...' * (len(own) > 5)} only there)"
    return ", ".join(fact) if isinstance(fact, list) else repr(fact)


def compare(arms: Sequence[Arm], split: str, metrics: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """{metric: one `paired_difference` (this minus the first) for each arm but the first}, with `p_holm` in each.

    Holm's correction is over all of these tests, of all metrics; None where there is no test.
    """
    first, *others = arms
    found = {
        metric: [paired_difference(arm.values(split, metric), first.values(split, metric)) for arm in others]
        for metric in metrics
    }
    _corrected([one for row in found.values() for one in row])
    return found


def compare_images(arms: Sequence[Arm], split: str) -> list[dict[str, Any]] | None:
    """`images_difference` of accuracy (this minus the first) for each arm but the first and each seed.

    With `arm`, `seed` and `p_holm`, over all of these tests, in each; None where a run kept no predictions.

    Raises:
        ValueError: when two runs were not predicting the same images.
    """
    first, *others = arms
    found = []
    for arm in others:
        for seed in arm.seeds:
            pair = [_right(one, seed, split) for one in (arm, first)]
            if pair[0] is None or pair[1] is None:
                return None
            (mine, my_labels), (its, its_labels) = pair[0], pair[1]
            if not np.array_equal(my_labels, its_labels):
                raise ValueError(
                    f"the {split} images of {first.name} and {arm.name}, seed {seed}, have other labels; only "
                    "predictions of the same images in the same order can be compared."
                )
            found.append({"arm": arm.name, "seed": seed} | images_difference(mine, its))
    _corrected(found)
    return found


def _right(arm: Arm, seed: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Whether each labelled image is classified rightly, and the names of the labels."""
    if (kept := read_predictions(arm.folders[seed], split)) is None:
        return None
    predicted, labels = kept
    names = np.append(arm.data["classes"], "no label")  # by name: two runs may order their classes differently
    return (predicted == labels)[labels != -100], names[np.where(labels == -100, -1, labels)]


def _corrected(tests: list[dict[str, Any]]) -> None:
    made = [one for one in tests if one["p_value"] is not None]
    for one, p in zip(made, holm([one["p_value"] for one in made]), strict=True):
        one["p_holm"] = p
