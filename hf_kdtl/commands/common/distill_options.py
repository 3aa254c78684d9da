"""What a user sets of `distill`, in addition to the data and the training."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.commands.common.cutting import CutOptions
from hf_kdtl.commands.common.labels import UnlabelledOptions
from hf_kdtl.models.teachers import check_names


@dataclass
class DistillOptions(CutOptions, UnlabelledOptions):
    """Teacher, student, and how many runs."""

    teacher: dict | str | None = field(
        default=None,
        metadata={
            "help": "A folder, Hub name or store (hf-kdtl cache); several: {name: folder}; self: the student less its "
            "adapters."
        },
    )
    teacher_batch: int | None = field(
        default=None, metadata={"help": "Images in each forward of the teacher; by default the batch."}
    )
    cache: str | None = field(
        default=None, metadata={"help": "auto: keep the teacher's outputs in output_dir/cache, so that it runs once."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "For a teacher of images and texts (CLIP, SigLIP); by default the data's."}
    )
    teacher_pool: str | None = field(
        default=None, metadata={"help": "A teacher's embedding: auto, pooler, class or mean (without labels)."}
    )
    teacher_dtype: str | None = field(
        default=None, metadata={"help": "bfloat16, float16, float32; by default as it was saved."}
    )
    teacher_options: dict | str | None = field(
        default=None, metadata={"help": "Of its from_pretrained, as JSON: device_map, quantization_config."}
    )
    templates: list[str] | None = field(default=None, metadata={"help": 'Its texts, such as "a photo of a {}".'})
    student: str | None = field(default=None, metadata={"help": "A folder or Hub name: a pre-trained student."})
    student_config: dict | str | None = field(
        default=None, metadata={"help": 'A student with random weights, as JSON: {"model_type": "vit", ...}.'}
    )
    adapter: dict | str | None = field(
        default=None, metadata={"help": 'Train an adapter of PEFT, as JSON: {"peft_type": "LORA", "r": 8, ...}.'}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels, for a student_config that has no size."})
    seeds: list[int] | None = field(default=None, metadata={"help": "One run for each; by default --seed alone."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the shards of --unlabelled as they come; with --max_steps."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images of a stream of which the next is drawn."})
    baseline: bool = field(
        default=False,
        metadata={"help": "Also train the student without the teacher, and on the labelled images alone."},
    )
    time_budget: str | None = field(default=None, metadata={"help": "As many steps as fit, of all runs: 20min."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Remove the run that output_dir holds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.teacher, dict) or str(self.teacher).lstrip().startswith("{"):
            self.teacher = {name: str(path) for name, path in cli.mapping("teacher", self.teacher).items()}
            check_names(self.teacher)

    @property
    def teacher_paths(self) -> dict[str, str]:
        """{name of the source: folder or Hub name} of the teacher, or of several; none of `self`."""
        if isinstance(self.teacher, dict):
            return self.teacher
        return {} if self.teacher in (None, "self") else {"teacher": str(self.teacher)}
