"""What a card is made from where a trainer has no results.json: what the trainer itself knows."""

from __future__ import annotations

import math
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_kdtl.evaluation.results import SCHEMA, to_json
from hf_kdtl.hub.card_results import JSON, hash_of, recipes_results
from hf_kdtl.hub.card_tables import ARM
from hf_kdtl.hub.provenance import histories, models_section
from hf_kdtl.models.labels import class_names
from hf_kdtl.utils.redaction import anonymous, is_local
from hf_kdtl.utils.wrapped import item_of

# Settings that a card should tell and that cannot name a machine or a user.
_SETTINGS = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
             "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16",
             "label_smoothing_factor", "seed", "view_seed", "teacher_pixels", "quantize", "layer_rates",
             "gradient_rule")  # fmt: skip


def results_of(trainer: Any) -> JSON:
    """results.json of a trainer's output_dir where it is of this very student, else the same from the trainer.

    What a trainer knows is its last evaluation of this student on eval_dataset; it is called validation, for it may
    have chosen by it.

    Raises:
        ValueError: as `read_results`, when output_dir holds a file that cannot be read.
    """
    mine = _from_trainer(trainer)
    found = recipes_results(trainer.args.output_dir)
    return found if found and hash_of(found) == hash_of(mine) else mine


def _from_trainer(trainer: Any) -> JSON:
    args, state = trainer.args, trainer.state
    scores, notes = _last_scores(trainer)
    results: JSON = {
        "schema": SCHEMA,
        "run": {
            "recipe": None,
            "settings": {key: value for key in _SETTINGS if (value := getattr(args, key)) is not None},
            "processes": args.world_size,
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type.upper(),
            "versions": {name: metadata.version(name) for name in ("hf_kdtl", "torch", "transformers", "accelerate")},
        },
        "data": {
            "source": None,
            "hub": False,
            "sizes": _sizes(train=trainer.train_dataset, validation=trainer.eval_dataset),
            "unlabelled": _unlabelled(trainer.train_dataset),
            "classes": class_names(trainer.model.config) or [],
            "notes": notes,
        },
        "objectives": args.entries,
        "models": models_section(trainer),
        "pairing": {"notes": [*(trainer.teacher.notes if trainer.teacher else []), *trainer.distiller.notes]},
        "curves": {"run": state.log_history},
        "evaluation": {"models": {ARM: {"runs": {str(args.seed): {"validation": scores}}}}} if scores else {},
    }
    results |= {section: {"run": history} for section, history in histories(trainer).items()}
    return anonymous(to_json(results), _folders(trainer))


def _folders(trainer: Any) -> set[str]:
    """The local folders that a trainer's notes may name, where they are not absolute."""
    names = [trainer.args.output_dir, getattr(trainer.model.config, "_name_or_path", None)]
    members = trainer.teacher.members() if trainer.teacher else {}
    names += [one.provenance().name_or_path for one in members.values()]
    return {str(name) for name in names if name and is_local(str(name))}


def _last_scores(trainer: Any) -> tuple[dict[str, float], list[str]]:
    """The last scores of the model as it is now on eval_dataset, and a note where all evaluations are of others."""
    from hf_kdtl.evaluation.metrics import METRICS

    state, args = trainer.state, trainer.args
    history = state.log_history
    end = next((place for place, entry in enumerate(history) if "train_runtime" in entry), len(history))
    best = state.best_model_checkpoint if args.load_best_model_at_end and end < len(history) else None
    step = state.global_step if best is None else int(Path(best).name.split("-")[-1])
    measured = [(place, entry) for place, entry in enumerate(history) if "eval_loss" in entry]
    if isinstance(trainer.eval_dataset, dict):
        several = f"eval_dataset has {len(trainer.eval_dataset)} splits, and a card shows the figures of one"
        return {}, [f"Not measured: {several}: set trainer.eval_dataset to it and call trainer.evaluate() before."]
    mine = [
        entry
        for place, entry in measured
        if (place > end or entry["step"] == step) and trainer.is_of_eval_dataset(entry)
    ]
    if not mine:
        why = f"no evaluation is of eval_dataset and of the student as it is (step {step}): call trainer.evaluate()"
        return {}, [f"Not measured: {why} before the card is made."] if measured else []
    found = {key.removeprefix("eval_"): value for key, value in mine[-1].items()}
    rounded = "It was measured in numbers of 8 bits (quantize): in full its saved weights answer a little otherwise."
    found = {key: value for key, value in found.items() if key in METRICS and math.isfinite(value)}
    return found, [rounded] if found and args.quantize else []


def _sizes(**datasets: Any) -> dict[str, int]:
    lengths = {name: 0 if isinstance(data, dict) else _length(data) for name, data in datasets.items()}
    return {name: length for name, length in lengths.items() if length}


def _unlabelled(images: Any) -> dict[str, int]:
    """How many images have a label and how many have none, where they are of an ImageDataset, also inside Subset and
    ConcatDataset; nothing where all are of one kind."""
    kinds: dict[int, list[int]] = {}
    labelled = []
    for source, row in (item_of(images, i) for i in range(_length(images))):
        if id(source) not in kinds:
            split = getattr(source, "split", None)  # of a datasets.Dataset it is only a name
            kinds[id(source)] = [] if split is None or isinstance(split, str) else split["label"][:]
        labelled += [label >= 0 for label in kinds[id(source)][row : row + 1]]
    if len(labelled) < _length(images) or len({*labelled}) < 2:
        return {}
    return {"labelled_images": sum(labelled), "unlabelled_images": len(labelled) - sum(labelled)}


def _length(images: Any) -> int:
    return len(images) if hasattr(images, "__len__") else 0
