"""Show which layers pair, what each objective costs and what will not run, for settings of `distill`; train nothing.

  hf-kdtl preflight --config digits
  hf-kdtl preflight --teacher runs/teacher/model --dataset my_images --student_flops 0.5 --objectives task jacobian

It takes every setting of hf-kdtl distill, and looks at one batch of training images.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders, pretraining
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.runs import say
from hf_kdtl.commands.common.store_worth import store_worth
from hf_kdtl.preflight import Report, preflight


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, look at the pair on one batch of training images, print the report."""
    cli.quiet()
    types = (DistillOptions, DataOptions, DistillationConfig)
    options, data_options, config = cli.parse(*types, argv=argv, doc=__doc__)
    typed = cli.typed_names(*types, argv=argv)
    if pretraining.asked(options, config, typed):
        study = pretraining.Pretraining(options, data_options, config, typed)
        say(config, *study.notes, "", str(report(study, study.train, study.teacher)))
        return
    experiment = Experiment(options, data_options, config, typed)
    found = report(experiment, experiment.data.train, experiment.source)
    say(config, str(found))
    if not found.problems:
        with tempfile.TemporaryDirectory() as folder:  # Trainer makes its output_dir
            trainer = experiment.trainer("distilled", experiment.seeds[0], Path(folder))
            worth = store_worth(experiment, trainer, argv)
        if worth:
            say(config, "", worth)


def report(study: Any, train: Dataset, teacher: Any) -> Report:
    """The report on one batch of training images."""
    pixels = builders.batch_of(builders.pixels(train, study.processor), range(8))
    return preflight(study.new_student(), teacher, study.config, pixels, study.processor)


if __name__ == "__main__":
    sys.exit(cli.run(main))
