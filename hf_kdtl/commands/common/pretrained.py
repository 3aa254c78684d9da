"""What is written of a run without labels: its settings before, its student, scores and report after training."""

from __future__ import annotations

import shutil
from typing import Any

from transformers import AutoModel

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.embedding_scores import SPLITS, picture, scores
from hf_kdtl.commands.common.next_command import command
from hf_kdtl.data.digests import digests
from hf_kdtl.evaluation.results import load_results, read_results, update_results
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.reports.embedding import embedding_lines
from hf_kdtl.reports.run_report import write_report


def sections(study: Any, run: dict, models: dict, notes: list[str], first: Any) -> dict[str, Any]:
    """What is known before training."""
    from hf_kdtl.hub.provenance import models_section

    kinds = {"student": "pretrained", "student_config": "random"}
    how = next((how for name, how in kinds.items() if getattr(study.options, name) is not None), "cut")
    sizes = {"held out": len(study.held_out)} | ({} if study.stream else {"train": len(study.train)})
    labelled = {}
    if study.labelled is not None:
        labelled = {f"labelled {name}": len(getattr(study.labelled, name)) for name in SPLITS}
    images = {"held out": study.held_out} | ({} if study.stream else {"train": study.train})
    source, streamed = str(study.options.unlabelled), study.stream is not None
    data = {"source": source, "hub": not streamed and builders.is_on_hub(source), "sizes": sizes | labelled}
    data |= {"classes": []}
    data |= {"digests": digests(images)}
    data |= {"notes": study.notes, "augmentation": cli.mapping("augmentation", study.data_options.augmentation)}
    return {
        "run": run,
        "defaults": study.chosen.record(),
        "data": data,
        "objectives": study.config.objectives,
        "models": models_section(first, {"how": how}),
        "pairing": models | {"notes": notes},
    }


def finish(study: Any) -> None:
    """Keep the best seed as student/, score it beside the teacher and itself before training, and write the report.

    All processes call it where the teacher is spread over them, else the main one alone.
    """
    spread, main = study.teacher.facts().sharded, study.config.process_index == 0
    scored = {seed: last_value(study, seed) for seed in study.seeds}
    better = max if study.config.greater_is_better else min
    seed = better(scored, key=lambda one: scored[one])
    kept = study.folder_of_seed(seed) / "model"
    after = AutoModel.from_pretrained(kept).eval()
    before = study.trainer(seed, study.folder).model.eval()
    models = ({"teacher": study.live} if study.live else {}) | {"student before": before, "student": after}
    sides = {name: (model, study.processor) for name, model in models.items()}
    found = scores(sides, study.held_out, study.labelled, study.config.per_device_eval_batch_size)
    if not main:
        return
    shutil.rmtree(study.folder / "student", ignore_errors=True)
    shutil.copytree(kept, study.folder / "student")
    value = {"seed": seed, "metric": study.config.metric_for_best_model} | found
    update_results(study.folder, "embedding", value)
    section = read_results(study.folder)["models"]
    section["student"]["fingerprint"] = fingerprint(after)
    update_results(study.folder, "models", section)
    seen = {name: side for name, side in sides.items() if not (spread and name == "teacher")}  # on this process alone
    missing = picture(study.folder, seen, study.held_out)
    write_report(study.folder)
    lines = embedding_lines(load_results(study.folder))
    student = study.folder / "student"
    head = command("train-teacher", "--dataset <labelled images>", model=student, output_dir="runs/classifier")
    lines += [missing] * bool(missing)
    runs.say(study.config, *lines, f"The student is in {student}. It takes a head from few labels:", f"  {head}")


def last_value(study: Any, seed: int) -> float:
    """The best value of the metric that a run was judged by."""
    name = f"eval_{str(study.config.metric_for_best_model).removeprefix('eval_')}"
    log = read_results(study.folder)["curves"][study.folder_of_seed(seed).name]
    values = [entry[name] for entry in log if entry.get(name) is not None]
    best = max if study.config.greater_is_better else min
    return best(values) if values else 0.0
