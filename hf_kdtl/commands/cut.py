"""Cut a student out of a teacher, to sizes or to a budget, and save it as a plain transformers model.

  hf-kdtl cut --teacher runs/teacher/model --flops 0.5 --output_dir runs/half
  hf-kdtl cut --teacher runs/teacher/model --layers 6 --heads 0.5 --mlp 0.5 --output_dir runs/small
  hf-kdtl cut --teacher runs/teacher/model --latency_ms 5 --output_dir runs/fast --importance first_order \\
      --dataset my_images

What goes and what the student will cost is printed first. The student is not trained: next, hf-kdtl distill --student.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common import builders
from hf_kdtl.commands.common.builders import DataOptions
from hf_kdtl.commands.common.cutting import IMPORTANCE, number, scored
from hf_kdtl.commands.common.next_command import command, split_flags
from hf_kdtl.models import Teacher
from hf_kdtl.models.student import Cut, build, plan_cut


@dataclass
class CutCommandOptions:
    """What to cut, and where to; counts, or shares with a point."""

    teacher: str = field(metadata={"help": "A folder or Hub name of an image classifier."})
    output_dir: str = field(metadata={"help": "Where the student goes."})
    layers: str | None = field(default=None, metadata={"help": "Blocks to keep: 6, or 0.5; of stages [2, 2, 4, 2]."})
    heads: str | None = field(default=None, metadata={"help": "Heads of each block to keep: 2, or 0.5."})
    mlp: str | None = field(default=None, metadata={"help": "Neurons of each block to keep: 768, or 0.5."})
    width: str | None = field(default=None, metadata={"help": "Channels of the residual stream to keep: 192, or 0.5."})
    flops: float | None = field(
        default=None, metadata={"help": "A budget, up to 1 a share: depth, heads and MLP are chosen to fit."}
    )
    parameters: float | None = field(default=None, metadata={"help": "The same for parameters."})
    latency_ms: float | None = field(default=None, metadata={"help": "The same for one image on this machine."})
    importance: str = field(default="uniform", metadata={"help": IMPORTANCE})
    overwrite: bool = field(default=False, metadata={"help": "Replace what output_dir holds."})

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "mlp", "width"):
            setattr(self, name, number(name, getattr(self, name)))

    @property
    def cut(self) -> Cut:
        """What is asked of the student."""
        names = ("layers", "heads", "mlp", "width", "flops", "parameters", "latency_ms", "importance")
        return Cut(**{name: getattr(self, name) for name in names})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, print the plan, save the student."""
    cli.quiet()
    types = (CutCommandOptions, DataOptions)
    options, data_options = cli.parse(*types, argv=argv, doc=__doc__)
    cut, output = options.cut, Path(options.output_dir)
    if (output / "config.json").exists() and not options.overwrite:
        raise ValueError(f"{output} holds a model. Give another --output_dir, or replace it: --overwrite true.")
    if output.resolve() == Path(options.teacher).resolve():
        raise ValueError(f"{output} is the teacher, which the student would replace; give another --output_dir.")
    typed = cli.typed_names(*types, argv=argv)
    builders.check_read(typed, () if cut.importance == "first_order" else ("train_images", "labels_per_class"))
    given = "dataset" in typed
    if cut.importance == "first_order" and not given:
        raise ValueError("--importance first_order needs labelled images: type --dataset <those of the teacher>.")
    teacher = Teacher.from_pretrained(builders.existing(options.teacher))
    data = builders.open_data(data_options) if cut.importance == "first_order" else None
    scores = scored(teacher, cut.importance, data)
    plan = plan_cut(teacher, cut, scores)
    tqdm.write(f"{plan}\n")
    student = build(teacher.classifier(), plan, scores)
    student.save_pretrained(output)
    builders.processor_of(options.teacher, student).save_pretrained(output)
    tqdm.write(f"{builders.summary(student)}, in {output}. Next, distill it:\n")
    images = split_flags(data_options) if given else "--dataset <your images>"
    flags = {"teacher": options.teacher, "student": output, "output_dir": f"{output}-distilled"}
    tqdm.write(f"  {command('distill', images, **flags)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
