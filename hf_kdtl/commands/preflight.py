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

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.distill_options import DistillOptions
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.runs import say
from hf_kdtl.commands.common.store_worth import store_worth
from hf_kdtl.preflight import preflight


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, look at the pair on one batch of training images, print the report."""
    cli.quiet()
    types = (DistillOptions, DataOptions, DistillationConfig)
    options, data_options, config = cli.parse(*types, argv=argv, doc=__doc__)
    experiment = Experiment(options, data_options, config, cli.typed_names(*types, argv=argv))
    pixels = builders.batch_of(builders.pixels(experiment.data.train, experiment.processor), range(8))
    student = experiment.new_student()
    report = preflight(student, experiment.source, config, pixels, experiment.processor)
    say(config, str(report))
    if not report.problems:
        with tempfile.TemporaryDirectory() as folder:  # Trainer makes its output_dir
            trainer = experiment.trainer("distilled", experiment.seeds[0], Path(folder))
            worth = store_worth(experiment, trainer, argv)
        if worth:
            say(config, "", worth)


if __name__ == "__main__":
    sys.exit(cli.run(main))
