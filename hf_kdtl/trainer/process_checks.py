"""Whether the launcher started the requested processes, and they have the same settings, data and student."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

# Settings of a process or its machine, which do not affect training.
OF_A_RANK = ("local_rank", "logging_dir", "disable_tqdm", "log_level", "log_level_replica")
LAUNCH = "accelerate launch --multi_gpu --num_processes"


def check_ranks(trainer: Any) -> None:
    """Compare all processes before the first step. Every process calls it; all of them raise, or none.

    Args:
        trainer: a DistillationTrainer, or any Trainer.

    Raises:
        ValueError: when a launcher started fewer processes than requested; when they differ in their settings, the
            number of their images or their student; when there are more processes than images.
    """
    args = trainer.args
    problem = launch_problem(os.environ, args.world_size)
    if problem is None and args.world_size > 1:
        problem = difference(gather_object([_described(trainer)]))
    if problem is None:
        problem = data_problem(trainer)
    if problem:
        raise ValueError(problem)


def launch_problem(environment: Mapping[str, str], world_size: int) -> str | None:
    """The problem where a launcher was configured for more processes than run, with the right command; or None."""
    asked = environment.get("WORLD_SIZE", "")
    if asked.isdigit() and int(asked) > world_size:
        return (
            f"the launcher requests {asked} processes (WORLD_SIZE) and this run has {world_size}: each would "
            f"train alone, and write to the same folder. Start it with {LAUNCH} {asked} <script>, on CPUs with "
            "use_cpu=True in the script, and create no second TrainingArguments before training."
        )
    # `accelerate launch` names a main process for several, and gives a rank to those that torchrun starts alone.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if by_accelerate and "MASTER_ADDR" in environment and not asked and world_size == 1:
        return (
            "accelerate launch was configured for several processes and started one. It does so silently for "
            f"--cpu, for the type MULTI_CPU, and where it finds no second GPU. Start them with {LAUNCH} 2 <script>, "
            "on CPUs with use_cpu=True in the script (--use_cpu true for the recipes); or request one, "
            "--num_processes 1 (and unset MASTER_ADDR, if your shell sets it)."
        )
    return None


def difference(described: list[dict[str, str]]) -> str | None:
    """The facts in which two processes differ, with both values; None where all are equal."""
    first = described[0]
    for rank, other in enumerate(described):
        names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if names:
            shown = "; ".join(f"{name} {first.get(name)} on 0 and {other.get(name)} on {rank}" for name in names[:5])
            more = f", and {len(names) - 5} more" if len(names) > 5 else ""
            return (
                f"processes 0 and {rank} differ in {', '.join(names[:5])}{more} ({shown}). They train one model: "
                f"start all of them with the same command, {LAUNCH} {len(described)} <script>, and do not derive a "
                "seed from the rank."
            )
    return None


def data_problem(trainer: Any) -> str | None:
    """The problem where no step would run, or a process would have no images of its own; or None."""
    args, data = trainer.args, trainer.train_dataset
    if not hasattr(data, "__len__"):
        return None
    images, processes, size = len(data), args.world_size, args.per_device_train_batch_size
    if images < processes:
        return (
            f"{processes} processes and {images} training images: some would only repeat the images of others. "
            f"Use at most {max(images, 1)}: --num_processes {max(images, 1)}, or more images."
        )
    if args.dataloader_drop_last and images < processes * size:
        return (
            f"{images} training images are fewer than one batch of {processes} x {size}, and dataloader_drop_last "
            "drops it, so training would make no step. Set --per_device_train_batch_size "
            f"{max(images // processes, 1)}, or --dataloader_drop_last false."
        )
    return None


def _described(trainer: Any) -> dict[str, str]:
    """Every setting of this process, the size of its data and its student, as short text."""
    settings = {k: v for k, v in trainer.args.to_dict().items() if k not in OF_A_RANK}
    facts = {name: _short(json.dumps(value, sort_keys=True, default=str)) for name, value in settings.items()}
    data = trainer.train_dataset
    if hasattr(data, "__len__"):
        facts["the number of training images"] = str(len(data))
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in trainer.model.named_parameters()]
    facts["the student's parameters"] = _short(json.dumps(shapes))
    return facts


def _short(text: str) -> str:
    """A text, or where it is long its beginning and a hash; without the addresses of objects."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) <= 60 else f"{text[:40]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
