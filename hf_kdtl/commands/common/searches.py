"""How `tune` and `probe` begin: the settings of `distill`, one process, a folder that can be continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, chosen, folders, pretraining, runs, timing
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.defaults import listing
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.runs import say

SEEDS = 3
SCORED = 1000  # validation images, at most: more would take the time of the runs
# Of these commands alone, or chosen again by distill.
OWN = ("budget", "max_trials", "candidates", "second", "output_dir", "overwrite_output_dir", "resume_from_checkpoint",
       "seed", "seeds", "objectives", "learning_rate", "max_steps", "num_train_epochs", "disable_tqdm")  # fmt: skip


def open_experiment(
    recipe: str, own: Any, options: DistillOptions, data_options: DataOptions, config: DistillationConfig,
    typed: set[str],
) -> tuple[Experiment, float]:  # fmt: skip
    """The experiment with its settings chosen, and the seconds of `--budget`.

    Raises:
        ValueError: for a folder that holds another run, what is no time, a flag of distill that has no meaning here,
            and several processes.
    """
    budget = timing.seconds(own.budget, "budget")
    if unused := sorted({"baseline", "time_budget"} & typed):
        raise ValueError(f"found {' and '.join(unused)}, of hf-kdtl distill alone; here --budget is the time.")
    if data_options.multi_label:
        raise ValueError(
            f"hf-kdtl {recipe} goes by accuracy, and the images have several labels (multi_label). Type hf-kdtl "
            "distill once for each setting, then hf-kdtl compare --runs <their folders> --metrics map."
        )
    if pretraining.asked(options, config, typed):
        raise ValueError(
            f"hf-kdtl {recipe} goes by accuracy, and this is a run without labels. Beside --unlabelled type --dataset "
            "<labelled images>, and objectives that read labels or class outputs; or type hf-kdtl distill."
        )
    if config.world_size > 1:
        raise ValueError("the runs are on one process; start this command without accelerate launch or torchrun.")
    folders.check_resumes_all(config)
    chosen.put_in(chosen.restored(config, typed) or [], config, data_options, typed)
    run = folders.describe_run(recipe, config, own, options, data_options)
    folders.check_folder(config, run, options.overwrite_output_dir)
    options.seeds = options.seeds or [config.seed + i for i in range(SEEDS)]
    experiment = Experiment(options, data_options, config, typed)
    _score_fewer(experiment)
    return experiment, budget


def _score_fewer(experiment: Experiment) -> None:
    """Leave SCORED validation images, the same for every run."""
    validation, seed = experiment.data.validation, experiment.data_options.split_seed
    if len(validation) > SCORED:
        rows = np.sort(np.random.default_rng(seed).permutation(len(validation))[:SCORED])
        experiment.data = replace(experiment.data, validation=validation.select(rows))
        experiment.notes.append(f"{SCORED:,} of {len(validation):,} validation images are scored, seed {seed}.")


def begin(experiment: Experiment, recipe: str, own: Any, fitting: Callable[[], int]) -> int:
    """Check one batch, claim output_dir, choose the length of a run, and print what is known.

    Args:
        fitting: the steps of a run that fit into the budget; asked where no length was typed.

    Returns:
        the steps of a full training.
    """
    config, settings = experiment.config, experiment.chosen
    assert settings is not None
    first = experiment.trainer("distilled", experiment.seeds[0], experiment.folder)
    runs.check_one_batch(first)
    full = settings.full_steps
    if not settings.continued and not {"max_steps", "num_train_epochs"} & {*settings.typed}:
        settings.set(min(full, fitting()))
    run = folders.describe_run(recipe, config, own, experiment.options, experiment.data_options)
    data = builders.facts(experiment.data, experiment.data_options)
    sections = {"run": run, "defaults": settings.record(), "data": data, "objectives": config.objectives}
    folders.begin(first, sections)
    say(config, *builders.describe_data(experiment.data), *(f"- {note}" for note in experiment.notes))
    say(config, *listing(settings.defaults))
    return full


def typed_settings(experiment: Experiment, typed: set[str]) -> dict[str, Any]:
    """What was typed and holds for `distill` too."""
    values = vars(experiment.options) | vars(experiment.data_options) | experiment.config.to_dict()
    return {name: values[name] for name in sorted(typed - {*OWN}) if values.get(name) is not None}


def printed(line: str) -> None:
    """A line for the terminal."""
    print(cli.printable(line), flush=True)
