"""A teacher's layer, compressed and exported: the fixed layer, and which teacher it belongs to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_kdtl.functional.bregman import Representation
from hf_kdtl.functional.links import LINKS, Link, find, leaky_relu
from hf_kdtl.functional.resample import matmul, precise
from hf_kdtl.models.bregman.outputs import width_of
from hf_kdtl.models.forward.geometry import ModelGeometry
from hf_kdtl.models.teachers.source import SignalSource, SourceInfo

TENSORS, JSON = "representation.safetensors", "representation.json"
SAVED = ("mean", "directions", "spectrum")


@dataclass(frozen=True)
class Provenance:
    """Where a representation comes from.

    Args:
        of, layer: what was represented (`outputs_of`).
        width: d.
        teacher, fingerprint: the model's class and name, and the hash of its weights.
        classes: of the probabilities, the class names column by column; None where the teacher names none.
        dataset, images: a hash of the pixels that the teacher was shown, and how many images.
        version: of hf_kdtl.
    """

    of: str
    layer: int | None
    width: int
    teacher: str
    fingerprint: str
    classes: list[str] | None
    dataset: str
    images: int
    version: str

    @classmethod
    def of_source(cls, source: SignalSource, of: str, layer: int | None, **facts: Any) -> Provenance:
        """Of a representation of this teacher; `facts` are width, dataset, images and version."""
        teacher = source.provenance()
        classes = teacher.class_names if of == "probabilities" else None
        return cls(of, layer, teacher=_name(teacher), fingerprint=source.fingerprint, classes=classes, **facts)

    def __str__(self) -> str:
        where = "" if self.layer is None else f" of block {self.layer}"
        return f"{self.of}{where} of {self.teacher}, width {self.width}, on {self.images} images"


class BregmanLayer(nn.Module):
    """The exported layer c -> f(V c + m), frozen: V (d, k) and m (d,) are buffers in float32.

    Args:
        representation: the fit, in float64. It is kept as it is for `encode` and `save`.
        provenance: where it comes from.

    Raises:
        ValueError: for a link that cannot be named in a file.

    Source: Amid, Anil, Fifty, Warmuth 2022, arXiv 2209.07080 [paper].
    """

    directions: Tensor
    mean: Tensor

    def __init__(self, representation: Representation, provenance: Provenance):
        super().__init__()
        if representation.link.name not in LINKS:
            raise ValueError(f"link is {representation.link.name!r}; expected {', '.join(map(repr, LINKS))}.")
        self.representation, self.provenance = representation, provenance
        self.register_buffer("directions", representation.directions.float().contiguous())
        self.register_buffer("mean", representation.mean.float().contiguous())

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for name in ("directions", "mean"):
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and not (saved.shape == own.shape and torch.equal(saved.to(own), own)):
                errors.append(
                    f"the representation of the {self.provenance} is another than the one that was trained with; give "
                    "back the folder that it was, or start a new run."
                )
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    @property
    def link(self) -> Link:
        """f."""
        return self.representation.link

    @property
    def k(self) -> int:
        """The number of coefficients."""
        return self.directions.shape[1]

    def before(self, c: Tensor) -> Tensor:
        """V c + m, the layer's output before f, (..., k) -> (..., d), in float32 or better."""
        c = precise(c)
        return matmul(c, self.directions.to(c).T) + self.mean.to(c)

    def forward(self, c: Tensor) -> Tensor:
        """f(V c + m), (..., k) -> (..., d), in float32 or better."""
        return self.link.f(self.before(c))

    def encode(self, y: Tensor) -> Tensor:
        """The best coefficients of outputs y, (..., d) -> (..., k), in float64, without a graph; see
        `Representation.encode`."""
        fit = self.representation
        here = replace(fit, mean=fit.mean.to(y.device), directions=fit.directions.to(y.device))
        return here.encode(y.reshape(-1, y.shape[-1])).reshape(*y.shape[:-1], self.k)

    def reordered(self, order: list[int] | None) -> BregmanLayer:
        """The same layer with output `order[i]` at place i; of probabilities, the classes of a student."""
        if order is None:
            return self
        fit, names = self.representation, self.provenance.classes
        fit = replace(fit, mean=fit.mean[order], directions=fit.directions[order])
        return BregmanLayer(fit, replace(self.provenance, classes=names and [names[i] for i in order]))

    def save(self, folder: str | Path) -> None:
        """Write the fit (safetensors, float64) and what it is (JSON); the JSON last: it marks a complete folder."""
        fit, path = self.representation, Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(fit, name).cpu().contiguous() for name in SAVED}
        Path(path, JSON).unlink(missing_ok=True)
        save_file(tensors, Path(path, TENSORS))
        about = {
            "link": self.link.name,
            "slope": _slope(self.link) if self.link.name == "leaky_relu" else None,
            "k": self.k,
            "explained": fit.explained,
            "divergence": fit.divergence,
            "baseline": fit.baseline,
            "spectrum": fit.spectrum.tolist(),
            "provenance": asdict(self.provenance),
        }
        part = Path(path, f"{JSON}.part")
        part.write_text(json.dumps({"version": 1} | about, indent=2) + "\n", encoding="utf-8")
        os.replace(part, Path(path, JSON))

    @classmethod
    def load(cls, folder: str | Path) -> BregmanLayer:
        """A layer that `save` wrote.

        Raises:
            FileNotFoundError: when the folder or one of its two files is missing.
            ValueError: when it is of another version, or the files do not belong together.
        """
        path = Path(folder).expanduser()
        if missing := [name for name in (JSON, TENSORS) if not Path(path, name).is_file()]:
            raise FileNotFoundError(
                f"{folder} has no {' and no '.join(missing)}; expected what hf-kdtl fit-representation writes."
            )
        about, tensors = json.loads(Path(path, JSON).read_text(encoding="utf-8")), load_file(Path(path, TENSORS))
        if about.get("version") != 1:
            raise ValueError(f"{folder} has version {about.get('version')!r} and this hf_kdtl reads 1; fit it again.")
        provenance, shape = Provenance(**about["provenance"]), tuple(tensors["directions"].shape)
        if shape != (provenance.width, about["k"]) or tensors["mean"].shape != shape[:1]:
            raise ValueError(
                f"{folder}: {TENSORS} holds directions {shape} and a mean {tuple(tensors['mean'].shape)}, {JSON} says "
                f"({provenance.width}, {about['k']}): they are of two fits. Fit it again."
            )
        link = leaky_relu(about["slope"]) if about["link"] == "leaky_relu" else find(about["link"])
        mean, directions, spectrum = (tensors[name] for name in SAVED)
        fit = Representation(link, mean, directions, spectrum, about["divergence"], about["baseline"])
        return cls(fit, provenance)

    def check_teacher(self, teacher: SignalSource) -> None:
        """Refuse the representation of another teacher, or of its classes in another order.

        Cost: the teacher's `fingerprint`.

        Raises:
            ValueError: naming both sides.
        """
        was, info = self.provenance, teacher.provenance()
        again = "Fit one of this teacher: hf-kdtl fit-representation."
        names = info.class_names
        if was.of == "probabilities" and (was.classes != names or info.num_labels != was.width):
            raise ValueError(
                f"the representation's columns are {was.classes or f'{was.width} unnamed classes'} and the teacher's "
                f"{names or f'{info.num_labels} unnamed classes'}. {again}"
            )
        if (found := teacher.fingerprint) != was.fingerprint:
            raise ValueError(
                f"the representation is of {was.teacher} with weights {was.fingerprint}, and the teacher is "
                f"{_name(info)} with weights {found}. {again} (The same model in another dtype is another one.)"
            )

    def check_width(self, geometry: ModelGeometry) -> None:
        """Refuse the representation of a layer that this teacher does not have, or that has another width here.

        Raises:
            ValueError: naming both sides.
        """
        was = self.provenance
        found = width_of(was.of, was.layer, geometry)
        if found and found != was.width:
            raise ValueError(
                f"the representation is of {was}, and here {geometry.name} gives rows of width {found} (at images of "
                f"{geometry.image[0]} x {geometry.image[1]}). Fit one at this size: hf-kdtl fit-representation."
            )


def _name(teacher: SourceInfo) -> str:
    """The class of a model and what it was loaded from; of a folder its last name, which tells of no machine."""
    source = teacher.name_or_path
    local = source.startswith(("/", ".", "~")) or Path(source).exists()
    return f"{teacher.architecture} {Path(source).name if local else source}".strip()


def _slope(link: Link) -> float:
    return link.slope(-torch.ones(1, dtype=torch.float64)).item()
