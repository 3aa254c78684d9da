"""results.json as typed records, which reports and cards read as attributes.

`Results.of(read_results(folder))` parses and checks all known sections at once. The file itself stays plain JSON, so
that what a record does not know survives: `update_results` replaces one section and leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_kdtl.evaluation.json_records import FILE as FILE
from hf_kdtl.evaluation.json_records import Record
from hf_kdtl.evaluation.model_records import Models

Scores = dict[str, float | None]
HEADLINES = {"accuracy": "accuracy", "map": "mAP"}
"""{the metric that tables and cards begin with: what they call it}, of one label an image and of several."""


def headline(scores: Mapping[str, Any]) -> str:
    """The metric that stands for a model: accuracy, or map where an image has several labels."""
    return "map" if "map" in scores else "accuracy"


@dataclass(frozen=True)
class Difference(Record):
    """Two models' scores, this minus the other, over images or over seeds."""

    mean: float
    number: int = 0
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    sd: float | None = None
    note: str = ""
    only_a: int = 0  # images that only this model classifies correctly
    only_b: int = 0


@dataclass(frozen=True)
class Bin(Record):
    """A bin of the expected calibration error."""

    images: int
    confidence: float | None = None
    accuracy: float | None = None
    lower: float = field(default=0.0, metadata={"key": "from"})
    upper: float = field(default=1.0, metadata={"key": "to"})


@dataclass(frozen=True)
class Latency(Record):
    """Milliseconds of a batch."""

    median: float
    p95: float | None = None


@dataclass(frozen=True)
class EvaluatedModel(Record):
    """A model of the section `evaluation`; what was not measured is None or empty."""

    runs: dict[str, dict[str, Scores]]  # {run: {split: {metric: value}}}
    role: str = ""  # student, teacher or baseline, in an evaluation
    accuracy_interval: tuple[float, float] | None = None
    reliability: list[Bin] = field(default_factory=list)
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    degraded: dict[str, float | list[float]] = field(default_factory=dict)  # clean: accuracy; a name: by severity
    device: str = ""
    dtype: str = ""
    parameters: int | None = None
    flops: float | None = None
    images_per_second: float | None = None
    latency_ms: dict[str, Latency] = field(default_factory=dict)  # by batch size
    peak_memory_bytes: float | None = None
    file_bytes: float | None = None
    fingerprint: str | None = None

    @property
    def headline(self) -> str:
        """`headline` of its scores."""
        return headline({name: None for run in self.runs.values() for scores in run.values() for name in scores})

    @property
    def clean_accuracy(self) -> float | None:
        """Accuracy on the images whose degraded versions were evaluated."""
        clean = self.degraded.get("clean")
        return clean if isinstance(clean, int | float) else None

    @property
    def by_degradation(self) -> dict[str, list[float]]:
        """{degradation: accuracy at each severity}."""
        return {name: row for name, row in self.degraded.items() if isinstance(row, list)}


@dataclass(frozen=True)
class AttentionAgreement(Record):
    mean: float
    pairs: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class BlockSimilarity(Record):
    """CKA: a row a teacher block, a column a student block."""

    matrix: list[list[float | None]]
    images: int = 0


@dataclass(frozen=True)
class Fidelity(Record):
    """How similar a student is to its teacher inside; `reasons` says why something is None."""

    images: int = 0
    jacobian_cosine: float | None = None
    cka: BlockSimilarity | None = None
    attention_agreement: AttentionAgreement | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DegradedImages(Record):
    images: int
    severities: list[int]
    side: int | None = None


@dataclass(frozen=True)
class Speed(Record):
    """Median milliseconds of a batch: {model: {form: {batch size: ms}}}; `reasons` says why a form is missing."""

    batch_size: int = 1
    latency_ms: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Export(Record):
    """The section `export`: files of the student as {form: ...}, onnx and int8; accuracy in [0, 1] on all of test."""

    accuracy: dict[str, float] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    images: int = 0
    calibration_images: int = 0
    max_drop: float | None = None
    speed: Speed | None = None
    device: str = ""
    fingerprint: str | None = None  # of the student


@dataclass(frozen=True)
class Evaluation(Record):
    """The section `evaluation`: of a training run (captions), or of a student (`split`, ...)."""

    models: dict[str, EvaluatedModel] = field(default_factory=dict)
    batch_size: int | None = None
    student_seed: int | None = None  # of the distilled student that is kept: the best on validation
    sheet: str = ""
    attention: str = ""
    gradients: str = ""
    split: str = ""
    images: int = 0
    degradations_left_out: list[str] = field(default_factory=list)
    max_drop: float | None = None  # points of accuracy that a student may lose
    speed: Speed | None = None
    degraded: DegradedImages | None = None
    fidelity: dict[str, Fidelity] = field(default_factory=dict)
    disagreement: dict[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """`headline` of its models."""
        return next((one.headline for one in self.models.values()), "accuracy")

    @property
    def student_run(self) -> str | None:
        """The run of the student that is kept, among those of `distilled`; before it was recorded, the first seed."""
        runs = self.models["distilled"].runs if "distilled" in self.models else {}
        return str(self.student_seed) if str(self.student_seed) in runs else next(iter(runs), None)


@dataclass(frozen=True)
class StudentEvaluation(Record):
    """An evaluation of the run's student, added to the results of its training."""

    evaluation: Evaluation
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison(Record):
    """Arm a minus arm b in a metric, paired by seed. low, high: the 95 % t interval; None without any spread."""

    a: str
    b: str
    metric: str
    split: str
    mean: float
    seeds: list[int]
    low: float | None = None
    high: float | None = None

    @property
    def note(self) -> str:
        """What the interval is, or why there is none."""
        number = len(self.seeds)
        if self.low is not None:
            return f"95% t interval over {number} seeds"
        if number == 1:
            return "one seed: no interval"
        return f"the same difference in all {number} seeds, no spread: no interval"


@dataclass(frozen=True)
class Run(Record):
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data(Record):
    source: str | None = None
    hub: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unlabelled: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class History(Record):
    """What layer rates or a gradient rule measured in one run."""

    options: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredTerm(Record):
    """A term's mean gradient at the start of a run, and the weight that it was given."""

    norm: float
    weight: float
    standard_error: float = 0.0


@dataclass(frozen=True)
class AutoWeights(Record):
    """The weights that one run measured; `terms` by key, with the reference's."""

    reference: str
    steps: int = 0
    ratios: dict[str, float] = field(default_factory=dict)
    terms: dict[str, MeasuredTerm] = field(default_factory=dict)


@dataclass(frozen=True)
class Results(Record):
    """A complete results.json."""

    schema: int = 2
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    objectives: list[dict[str, Any]] = field(default_factory=list)
    models: Models | None = None
    pairing: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    stages: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of a student that was cut in steps
    layer_rates: dict[str, History] = field(default_factory=dict)
    gradient_rule: dict[str, History] = field(default_factory=dict)
    auto_weights: dict[str, AutoWeights] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    comparison: list[Comparison] = field(default_factory=list)
    student_evaluation: StudentEvaluation | None = None
    export: Export | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # sections of other programs

    @property
    def is_evaluation(self) -> bool:
        """Whether these are the results of an evaluation, and not of a training."""
        return bool(self.evaluation.split)
