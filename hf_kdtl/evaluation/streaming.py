"""The base of the metrics: modules of `evaluate` that keep sums over images, and no image."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from itertools import chain
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Sequence, Value
from torch import Tensor

CHUNK = 2**20  # logits processed at a time: 8 MB in float64

_FEATURES = {
    "logits": Sequence(Value("float64")),
    "labels": Value("int64"),
    "multi_labels": Sequence(Value("float64")),
}
_WORDS = {
    "logits": "logits (n, K), a list of lists, an array or a tensor.",
    "labels": "labels (n,), whole numbers from 0 to K - 1; an image of label -100 is left out.",
    "multi_labels": "labels (n, K) of 1, 0 and -100 (not known); an image of which all are -100 is left out.",
}


class StreamingMetric(evaluate.Metric):
    """A metric that is a function of sums over images: `add_batch` adds to the sums and forgets the images.

    The sums are exact (fractions, rounded once at the end), so that the value is the same to the last bit however the
    images are ordered, batched or shared out among processes. Several processes: under Trainer nothing needs to be
    done, it gathers the logits and drops the repeated images before `compute_metrics`. In a loop of your own gather
    them (`accelerator.gather_for_metrics`), or give `num_process`, `process_id` and `experiment_id`: then `evaluate`
    shares the logits by file as for its own metrics, which keeps all of them on disk, and process 0 gets the value.

    A subclass has `inputs` (name -> "logits", "labels" or "multi_labels", in the order in which `sums` takes them),
    `citation_text`, a docstring whose first paragraph is the description, `sums` and, where it is no mean, `value`.

    Cost: one look at each logit, in float64; memory of a chunk (some 50 MB), whatever the number of images.

    Raises:
        ValueError: for inputs that are missing or unknown, of other shapes or of different lengths, for logits that
            are not finite or of another number of classes than before, for labels out of range, and when nothing
            (or nothing with a label) was added.
    """

    inputs: ClassVar[dict[str, str]] = {"predictions": "logits", "references": "labels"}
    citation_text = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._forget()

    def sums(self, *arrays: Any) -> dict[str, Any]:
        """Sums over some images, {name: int, Fraction, or array of them}, of the inputs in the order of `inputs`.

        Logits are float64 (n, K), labels int64 (n,) within 0 .. K - 1; images without a label are left out, n > 0.
        """
        raise NotImplementedError

    def value(self, sums: dict[str, Any], count: int) -> Any:
        """The metric, from the sums over `count` > 0 images: by default the mean of what `sums` calls "sum"."""
        return float(sums["sum"] / count)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch to the sums."""
        given = self._named(predictions=predictions, references=references, **kwargs)
        if self.num_process > 1:
            super().add_batch(**given)
        else:
            self._add(given)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one image to the sums."""
        given = self._named(predictions=prediction, references=reference, **kwargs)
        self.add_batch(**{name: [one] for name, one in given.items()})

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """The metric of everything that was added, and of what is given here; starts over afterwards."""
        given = {"predictions": predictions, "references": references, **kwargs}
        if self.num_process > 1:
            return super().compute(**given)
        if any(one is not None for one in given.values()):
            self.add_batch(**given)
        try:
            return self._result()
        finally:
            self._forget()

    def __len__(self) -> int:
        return super().__len__() if self.num_process > 1 else self._images

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=" ".join((inspect.getdoc(type(self)) or "").split("\n\n")[0].split()),
            citation=self.citation_text,
            inputs_description="\nArgs:\n" + "\n".join(f"    {k}: {_WORDS[v]}" for k, v in self.inputs.items()) + "\n",
            features=Features({name: _FEATURES[kind] for name, kind in self.inputs.items()}),
        )

    def _compute(self, **given: Any) -> dict[str, Any]:
        # Only for num_process > 1: the parts of all processes, which `evaluate` has read from their files.
        self._add(given)
        try:
            return self._result()
        finally:
            self._forget()

    def _forget(self) -> None:
        self.total: dict[str, Any] = {}
        self._images = self._count = 0  # all, and those with a label
        self._classes: int | None = None

    def _named(self, **given: Any) -> dict[str, Any]:
        given = {name: one for name, one in given.items() if one is not None}
        if set(given) != set(self.inputs):
            found, expected = (", ".join(names) or "nothing" for names in (sorted(given), self.inputs))
            raise ValueError(f"{self.name}: found {found}; expected exactly {expected}.")
        return given

    def _add(self, given: dict[str, Any]) -> None:
        arrays = {name: self._array(name, given[name]) for name in self.inputs}
        first, *others = arrays
        number, classes = len(arrays[first]), self._classes
        for name in others:
            if len(arrays[name]) != number:
                found = f"{number} {first} and {len(arrays[name])} {name}"
                raise ValueError(f"{self.name}: found {found}; expected one of each for every image.")
        for name in arrays:
            if self.inputs[name] != "labels":
                classes = self._width(name, arrays[name], classes)
        assert classes is not None
        total, count, rows = self.total, 0, max(1, CHUNK // classes)
        for start in range(0, number, rows):
            chunk = {name: array[start : start + rows] for name, array in arrays.items()}
            clean = self._clean(chunk, classes)
            if some := len(clean[0]):
                total, count = _plus(total, self.sums(*clean)), count + some
        # Only now: a batch that is refused has added nothing.
        self.total, self._count, self._images = total, self._count + count, self._images + number
        self._classes = classes

    def _array(self, name: str, given: Any) -> np.ndarray:
        """An input as an array of the right number of axes, in the dtype in which it came."""
        if isinstance(given, Tensor):
            given = given.detach().cpu()
            given = (given.double() if given.is_floating_point() else given).numpy()
        try:
            array = np.asarray(given)
        except ValueError as error:
            raise ValueError(f"{self.name}: {name} are rows of different lengths; expected (n, K).") from error
        kind = self.inputs[name]
        if array.ndim != (1 if kind == "labels" else 2) or (len(array) and array.dtype.kind not in "iuf"):
            found = f"{array.dtype} of shape {array.shape}"
            raise ValueError(f"{self.name}: {name} are {found}; expected {_WORDS[kind]}")
        return array

    def _width(self, name: str, array: np.ndarray, before: int | None) -> int:
        """The number of classes, the same in all logits."""
        found = array.shape[1]
        least = 1 if "multi_labels" in self.inputs.values() else 2
        if found < least or found != (before or found):
            expected = f"{before}, as in the others" if before else f"at least {least}"
            raise ValueError(f"{self.name}: {name} have {found} classes; expected {expected}.")
        return found

    def _clean(self, chunk: dict[str, np.ndarray], classes: int) -> list[np.ndarray]:
        """The images with a label, checked, in float64 and int64."""
        found = {name: self._checked(name, array, classes) for name, array in chunk.items()}
        keep = np.ones(len(next(iter(chunk.values()))), dtype=bool)
        for name, array in found.items():
            if self.inputs[name] == "labels":
                keep &= array != -100
            elif self.inputs[name] == "multi_labels":
                keep &= (array != -100).any(1)
        return list(found.values()) if keep.all() else [array[keep] for array in found.values()]

    def _checked(self, name: str, array: np.ndarray, classes: int) -> np.ndarray:
        if self.inputs[name] == "labels":
            known = (array == np.floor(array)) & (array < classes) & ((array >= 0) | (array == -100))
            if not known.all():
                raise ValueError(
                    f"{self.name}: {name} hold {array[~known][0]}; expected whole numbers from 0 to {classes - 1}, or "
                    "-100 for no label."
                )
            return array.astype(np.int64)
        if self.inputs[name] == "multi_labels":
            if not (known := np.isin(array, (0, 1, -100))).all():
                raise ValueError(f"{self.name}: {name} hold {array[~known][0]}; expected 1, 0, or -100 for not known.")
            return array.astype(np.int64)
        # In one layout: numpy adds up the classes of an image in an order that depends on it.
        logits = np.ascontiguousarray(array, dtype=np.float64)
        if bad := int((~np.isfinite(logits).all(1)).sum()):
            raise ValueError(
                f"{self.name}: the {name} of {bad} images in a batch are not finite; a model that answers so has "
                "diverged, or overflows in half precision."
            )
        return logits

    def _result(self) -> dict[str, Any]:
        if not self._images:
            raise ValueError(f"{self.name}: nothing was added; expected {', '.join(self.inputs)} of some images.")
        if not self._count:
            raise ValueError(f"none of the {self._images} images has a label (all are -100); expected at least one.")
        return {self.name: self.value(self.total, self._count)}


def exact_sum(values: np.ndarray) -> Fraction:
    """sum_i v_i without any rounding, so that sums can be added in any order.

    >>> float(exact_sum(np.array([1e16, 1.0, -1e16])))
    1.0

    Raises:
        ValueError: when a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError("an image's share of a sum is not finite: its logits lie further apart than floats reach.")
    listed, parts = values.tolist(), [0.0]
    while rest := math.fsum(chain(listed, (-part for part in parts))):
        parts.append(rest)
    return sum(map(Fraction, parts), Fraction(0))


def _plus(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {name: a[name] + b[name] for name in b} if a else b
