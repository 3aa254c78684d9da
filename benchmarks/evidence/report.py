"""The tables and the figure of benchmarks/results, made from the runs' JSON lines alone.

    python -m benchmarks.evidence.report

Writes <table>.md beside each <table>.jsonl, and the figure of docs/ once each arm has two numbers of labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.evidence.comparison import ArmRuns, Lines, against, arm_runs, comparison_table, curve_table
from benchmarks.evidence.few_labels_many_images import ADDED, AUTO
from benchmarks.evidence.runs import RESULTS
from benchmarks.evidence.small_pages import auto_weight, cut, probe_reliability
from hf_kdtl.evaluation.statistics import mean_and_std, mean_interval
from hf_kdtl.reports.figures.style import new_figure, save
from hf_kdtl.utils.text import markdown_table

FIGURES = Path(__file__).parents[2] / "docs"
SEEDS = 10  # of the plan; arms with fewer are unfinished


def labels_worth(accuracy: float, labels: Sequence[int], alone: Sequence[float]) -> str:
    """How many labels a class the student alone needs for an accuracy, interpolated on the logarithm of the labels.

    >>> labels_worth(50.0, [10, 1000], [40.0, 60.0])
    '100'
    """
    if accuracy > max(alone):
        return f"more than {max(labels)}"
    return f"{math.exp(np.interp(accuracy, alone, np.log(labels))):.0f}"


def few_labels_figure(runs: Sequence[ArmRuns], path: Path, names: dict[str, str]) -> None:
    """Accuracy against labels a class: mean over seeds and its 95 % interval, a line an arm."""
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    colors = dict(zip(names, ("#E69F00", "#56B4E9", "#0072B2"), strict=True))
    for arm, name in names.items():
        points = sorted((int(run.setting.split("_")[-1]), list(run.test.values())) for run in runs if run.arm == arm)
        means = [fmean(values) for _, values in points]
        intervals = [mean_interval(values) or (m, m) for (_, values), m in zip(points, means, strict=True)]
        errors = np.abs(np.array(intervals).T - means)
        labels = [each for each, _ in points]
        axes.errorbar(labels, means, errors, label=name, color=colors[arm], marker="o", capsize=3)
    ticks = sorted({int(run.setting.split("_")[-1]) for run in runs})
    axes.set(xscale="log", xlabel="labels of each class", ylabel="test accuracy, %")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, path, 150)


FEW_LABELS = {
    "alone": "student alone, on the labelled images",
    "kd_labelled": "distilled, on the labelled images",
    "kd_unlabelled": "distilled, with the unlabelled images",
}


def few_labels(lines: Lines) -> str:
    """Table 1: against `kd_labelled`, against `alone`, and what is added to `kd_unlabelled` against that."""
    runs = arm_runs(lines)
    settings = sorted({run.setting for run in runs}, key=_dataset_and_labels)
    runs.sort(key=lambda run: settings.index(run.setting))
    text = comparison_table(runs, {s: f"{s}/kd_labelled" for s in settings})
    against_alone = comparison_table(
        [run for run in runs if run.arm != "kd_labelled"], {s: f"{s}/alone" for s in settings}
    )
    more = {run.setting for run in runs if run.arm in (AUTO, *ADDED)}
    to_unlabelled = comparison_table(
        [run for run in runs if run.setting in more and run.arm in ("kd_unlabelled", AUTO, *ADDED)],
        {s: f"{s}/kd_unlabelled" for s in more},
    )
    tables = {"kd_labelled": text, "alone": against_alone, "kd_unlabelled": to_unlabelled}
    return "\n\n".join([*(f"Reference `{arm}`:\n\n{table}" for arm, table in tables.items()), _worth(runs)])


def _dataset_and_labels(setting: str) -> tuple[str, int]:
    dataset, _, labels = setting.rpartition("_")
    return dataset, int(labels)


def _worth(runs: Sequence[ArmRuns]) -> str:
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:  # in the order of their labels
        if len(run.test) >= SEEDS:
            dataset, labels = _dataset_and_labels(run.setting)
            curves.setdefault((dataset, run.arm), {})[labels] = fmean(run.test.values())
    rows = [
        [dataset, str(labels), FEW_LABELS[arm], f"{accuracy:.2f}", labels_worth(accuracy, [*alone], [*alone.values()])]
        for (dataset, arm), curve in curves.items()
        if arm in FEW_LABELS and arm != "alone" and len(alone := curves.get((dataset, "alone"), {})) > 1
        for labels, accuracy in curve.items()
    ]
    if not rows:
        return "What labels are worth needs the student alone at two numbers of labels."
    worth = "labels a class that the student alone needs for it"
    return markdown_table([["images", "labels a class", "arm", "test accuracy, %", worth], *rows])


def never_hurt(lines: Lines) -> str:
    """Table 5: each cell's arms against the student without the transfer term, and the rules against the plain sum."""
    alone = {run.setting: run for run in arm_runs([line for line in lines if line["arm"] == "alone"])}
    rest: dict[str, Lines] = {}
    for line in lines:
        if line["arm"] != "alone":
            rest.setdefault(f"{line['setting']}, weight {line['weight']:g}", []).append(line)
    runs = list(alone.values())
    for setting, found in rest.items():
        runs += [run._replace(setting=setting) for run in arm_runs(found)]
    optimizer = {setting: setting.split("_")[0] for setting in [*rest, *alone]}
    to_alone = comparison_table(runs, {s: f"{o}/alone" for s, o in optimizer.items()})
    to_plain = comparison_table([r for r in runs if r.arm != "alone"], {s: f"{s}/plain" for s in rest})
    return f"Reference `alone`:\n\n{to_alone}\n\nReference `plain`:\n\n{to_plain}"


def jacobian_digits(lines: Lines) -> str:
    """Table 4a: against `kd`."""
    return against(arm_runs(lines), "kd")


def backbone_transfer(lines: Lines) -> str:
    """Table 9: against `kd_labelled` and `alone` of table 1 with the same seeds, and the probe before and after."""
    seeds = {line["seed"] for line in lines}
    first = [json.loads(line) for line in (RESULTS / "few_labels_many_images.jsonl").read_text().splitlines()]
    shared = [x for x in first if x["setting"] == "cifar10_10" and x["arm"] in ("alone", "kd_labelled")]
    runs = arm_runs([x for x in shared if x["seed"] in seeds] + [x for x in lines if x["arm"] != "pretraining"])
    runs, (known,) = [r for r in runs if r.arm != "teachers_probe"], [r for r in runs if r.arm == "teachers_probe"]
    probes = [run for run in runs if run.arm.endswith("probe")]
    parts = {"kd_labelled": runs, "alone": [r for r in runs if r.arm != "kd_labelled"], "random_probe": probes}
    tables = [
        f"Reference `{arm}`:\n\n{comparison_table(found, {'cifar10_10': f'cifar10_10/{arm}'})}"
        for arm, found in parts.items()
    ]
    mean, sd = mean_and_std(list(known.test.values()))
    tables.append(
        f"`teachers_probe`, both teachers' own embeddings, C {known.weight:g}: {mean:.2f} % (sd {sd:.2f}). No "
        "competitor: they were trained on all labels of these ten classes."
    )
    return "\n\n".join(tables)


def conv_guides_vit(lines: Lines) -> str:
    """Table 2: against soft labels, labels, and the features without soft labels; weights by hand and measured."""
    runs = arm_runs(lines)
    weighed = against([run for run in runs if run.arm.startswith("both")], "both", "both_auto")
    return f"{against(runs, 'logit_kd', 'alone', 'hidden_states')}\n\n{weighed}\n\n{curve_table(lines)}"


def rates_of_layers(lines: Lines) -> str:
    """Table 6: against equal rates, and against the same rates in another order."""
    return against(arm_runs(lines), "uniform", "permuted")


def cut_and_recover(lines: Lines) -> str:
    """Table 3: against soft labels, and against labels."""
    by_setting: dict[str, Lines] = {}
    for line in lines:
        by_setting.setdefault(line["setting"], []).append(line)
    curves = [f"{setting}. {curve_table(found)}" for setting, found in sorted(by_setting.items())]
    runs = sorted(arm_runs(lines), key=lambda run: run.setting)
    return "\n\n".join([against(runs, "kd", "labels"), *curves])


def jacobian_vgg(lines: Lines) -> str:
    """Table 4: against `kd`."""
    return against(arm_runs(lines), "kd")


def robust_students(lines: Lines) -> str:
    """Table 4b: clean, with noise and attacked, against `kd` in each; the teacher's beside."""
    measures = {"clean": "test", "noise": "noise", "pgd": "pgd"}
    students = [line for line in lines if line["arm"] != "teacher"]
    runs = [
        run
        for name, measure in measures.items()
        for run in arm_runs([{**line, "setting": name, "test": line[measure]} for line in students])
    ]
    (teacher,) = [line for line in lines if line["arm"] == "teacher"]
    known = ", ".join(f"{name} {100 * teacher[measure]:.1f} %" for name, measure in measures.items())
    return f"The teacher: {known}.\n\n{comparison_table(runs, {name: f'{name}/kd' for name in measures})}"


def bregman_hint(lines: Lines) -> str:
    """Table 7: against the hint, and against soft labels alone."""
    return f"{against(arm_runs(lines), 'kd_hint', 'kd')}\n\n{curve_table(lines)}"


TABLES = {
    "jacobian_digits": jacobian_digits,
    "few_labels_many_images": few_labels,
    "never_hurt_rules": never_hurt,
    "cut": cut,
    "auto_weight": auto_weight,
    "backbone_transfer": backbone_transfer,
    "probe_reliability": probe_reliability,
    "conv_guides_vit": conv_guides_vit,
    "cut_and_recover": cut_and_recover,
    "jacobian_vgg": jacobian_vgg,
    "robust_students": robust_students,
    "rates_of_layers": rates_of_layers,
    "bregman_hint": bregman_hint,
}
UNFINISHED = f"Arms with fewer than {SEEDS} seeds are unfinished: nothing is claimed from them."
NOTES = {
    "cut": "Three seeds: nothing is claimed. Lines of other steps than 500 are trials, and not shown.",
    "auto_weight": "Differences are paired by seed, with a 95 % t interval.",
    "probe_reliability": "Three seeds, 95 % intervals; the foretold one is for the best of the distilled arms. "
    "Measured while the second term was weighed against a tenth of the cross-entropy; since then against logit_kd.",
    "cut_and_recover": "Ten seeds on the digits; three on cifar10 (`depth_half`, `heads_and_mlp_half`): nothing is "
    "claimed from these.",
    "backbone_transfer": "Five seeds, as planned. The weight is a learning rate, or the C of a probe; `alone` and "
    "`kd_labelled` are lines of few_labels_many_images.jsonl.",
}


def written(name: str, lines: Lines) -> str:
    """The text of results/<name>.md."""
    hours = sum(line.get("cpu_seconds", line.get("seconds", 0.0)) for line in lines) / 3600
    title = name.replace("_", " ").capitalize()
    head = f"# {title}\n\nMade by `python -m benchmarks.evidence.report` from {name}.jsonl; the plan is ../plan.md.\n"
    return f"{head}{len(lines)} runs, {hours:.1f} hours. {NOTES.get(name, UNFINISHED)}\n\n{TABLES[name](lines)}\n"


def main() -> None:
    for name in TABLES:
        file = RESULTS / f"{name}.jsonl"
        if not file.exists():
            continue
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.with_suffix(".md").write_text(written(name, lines))
        if name == "few_labels_many_images":
            runs = [run for run in arm_runs(lines) if run.setting.startswith("cifar10_")]
            if min(sum(run.arm == arm for run in runs) for arm in FEW_LABELS) > 1:
                few_labels_figure(runs, FIGURES / f"{name}.png", FEW_LABELS)


if __name__ == "__main__":
    main()
