"""Does hf-kdtl probe foretell what a full training gains? The plan stands in benchmarks/plan.md.

    python benchmarks/probe_reliability.py --data <folder of the sets> --teacher <cifar10 ViT> --work runs/probes

The folder holds cifar10, tiny_imagenet100, trashnet and caltech99, each with train, validation and test. The teacher
is that of cifar10, and what the other three teachers start from. Trains what benchmarks/results/
probe_reliability.jsonl does not hold; python -m benchmarks.evidence.report writes its page. Stopped and started again
it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PrinterCallback
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.evidence.small_pages import probe_reliability
from hf_kdtl import DistillationConfig
from hf_kdtl.commands import train_teacher
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.probing import ALONE, Probe, verdict
from hf_kdtl.commands.common.searches import begin, open_experiment
from hf_kdtl.commands.common.trials import RunLog
from hf_kdtl.commands.probe import ProbeOptions

LABELS = {"cifar10": (10, 50, 250), "trashnet": (5, 15, 45), "caltech99": (2, 5, 10), "tiny_imagenet100": (4, 16, 64)}
STUDENT = {"model_type": "bit", "num_channels": 3, "embedding_size": 16, "hidden_sizes": [32, 64, 128, 256],
           "depths": [1, 1, 1, 1], "layer_type": "preactivation", "num_groups": 8}  # fmt: skip
SEEDS = (1, 2, 3)
SHORT, FULL = 60, 400  # steps of the probe's runs, and of a full training
TESTED = 2500  # test images, at most
OUT = Path(__file__).parent / "results" / "probe_reliability.jsonl"


def teacher_of(name: str, data: Path, start: str, work: Path) -> str:
    """The folder of a set's teacher: trained from the start with all labels, by the command's own settings."""
    if name == "cifar10":
        return start
    folder = work / f"{name}_teacher"
    if not (folder / "model").is_dir():
        train_teacher.main(
            ["--dataset", str(data / name), "--model", start, "--output_dir", str(folder), "--time_budget", "4min",
             "--overwrite_output_dir", "true", "--use_cpu", "true", "--disable_tqdm", "true"]
        )  # fmt: skip
    return str(folder / "model")


def opened(name: str, labels: int, teacher: str, folder: Path) -> tuple[Experiment, Any]:
    """The experiment of a probe, as its command opens it."""
    flags = ["--dataset", name, "--teacher", teacher, "--student_config", json.dumps(STUDENT), "--image_size", "32",
             "--labels_per_class", str(labels), "--unlabelled", "rest", "--per_device_train_batch_size", "32",
             "--seeds", *map(str, SEEDS), "--output_dir", str(folder),
             "--overwrite_output_dir", "true", "--use_cpu", "true", "--disable_tqdm", "true"]  # fmt: skip
    types = (ProbeOptions, DistillOptions, DataOptions, DistillationConfig)
    own, options, data_options, config = cli.parse(*types, argv=flags, doc=__doc__)
    typed = cli.typed_names(*types, argv=flags)
    return open_experiment("probe", own, options, data_options, config, typed)[0], own


def foretold(experiment: Experiment, own: Any) -> dict[str, Any]:
    """What the probe says of a training of FULL steps."""
    probe = Probe(experiment, own.second, RunLog(experiment.folder / "runs.jsonl"), lambda line: None)
    begin(experiment, "probe", own, lambda: SHORT)
    probe.run()
    found = probe.found(FULL)
    assert experiment.chosen is not None
    gain = found["gains"][found["best"]]
    return {"best": found["best"], "objectives": found["objectives"], "gain": gain["mean"],
            "interval": gain["interval"], "says": verdict(found), "steps": experiment.chosen.steps}  # fmt: skip


def trained(experiment: Experiment, arm: str, seed: int) -> dict[str, Any]:
    """A full training of an arm, scored on test images."""
    assert experiment.chosen is not None
    experiment.chosen.set(FULL)
    with tempfile.TemporaryDirectory() as folder:
        settings = runs.untracked(experiment.config)
        settings.max_steps = FULL
        trainer = experiment.trainer(arm, seed, Path(folder), settings)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        test = experiment.data.test
        stride = -(-len(test) // TESTED)
        images = builders.pixels(test.select(range(0, len(test), stride)), experiment.processor)
        return {"test": trainer.evaluate(images)["eval_accuracy"], "images": len(images)}


def cell(name: str, labels: int, teacher: str, options: argparse.Namespace, log: RunLog) -> None:
    """The probe of a set with that many labels a class, and the full trainings it spoke of."""
    setting = f"{name}, {labels} labels a class"
    folder = options.work / f"{name}-{labels}"
    experiment, own = opened(str(options.data / name), labels, teacher, folder)
    common = {"table": "probe_reliability", "setting": setting, "labels": labels}
    line = log.once(f"{setting}: probe", common | {"arm": "probe"}, lambda: foretold(experiment, own))
    if line["best"] not in experiment.arms:  # the probe ran before: its arms are made again
        Probe(experiment, own.second, RunLog(folder / "unused.jsonl"), lambda line: None)
    for seed in SEEDS:
        for arm in (ALONE, line["best"]):
            facts = common | {"arm": arm, "seed": seed, "steps": FULL}
            log.once(f"{setting}: {arm}, seed {seed}", facts, lambda a=arm, s=seed: trained(experiment, a, s))
    full = [log.lines[f"{setting}: {arm}, seed {s}"]["test"] for arm in (ALONE, line["best"]) for s in SEEDS]
    gained = fmean(full[len(SEEDS) :]) - fmean(full[: len(SEEDS)])
    print(f"{setting}: foretold {100 * line['gain']:+.1f}, gained {100 * gained:+.1f} points", flush=True)


def main() -> None:
    """Train what is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/probes"))
    parser.add_argument("--sets", nargs="+", choices=list(LABELS), default=list(LABELS))
    options = parser.parse_args()
    logging.set_verbosity_error()
    cli.quiet()
    log = RunLog(OUT)
    for name in options.sets:
        teacher = teacher_of(name, options.data, options.teacher, options.work)
        for labels in LABELS[name]:
            cell(name, labels, teacher, options, log)
    print(probe_reliability([*log.lines.values()]))


if __name__ == "__main__":
    sys.exit(main())
