"""Representations made up for a teacher, without a fit: what `bregman` needs in tests that run every objective.

complete("bregman", {"representation": "attention"}, teacher)   the option is now a folder of that teacher's
complete("logit_kd", {}, teacher)                               as it was
"""

import atexit
import tempfile
from pathlib import Path
from shutil import rmtree

import torch

from hf_kdtl.functional.bregman import Representation
from hf_kdtl.functional.links import conjugate, find
from hf_kdtl.models import Teacher
from hf_kdtl.models.bregman.layer import BregmanLayer, Provenance
from hf_kdtl.models.bregman.outputs import LINKS_OF, OF_BLOCK, width_of
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.forward.classifier import blank_pixels
from hf_kdtl.models.forward.geometry import describe

FOLDER = Path(tempfile.mkdtemp())
atexit.register(rmtree, FOLDER, ignore_errors=True)


def complete(name, options, teacher):
    """The options, with a representation of this teacher where one is needed; by default of its probabilities."""
    if name != "bregman":
        return options
    of = options.get("representation", "probabilities")
    folder = FOLDER / f"{of}-{fingerprint(teacher)}"
    made_up(teacher, of).save(folder)
    return options | {"representation": str(folder)}


def made_up(teacher, of, k=2, link=None, layer=None):
    """Random directions and mean for a layer of this teacher, by default of its last block."""
    geometry = describe(teacher, blank_pixels(teacher))
    if of in OF_BLOCK and layer is None:
        layer = len(geometry.layers) - 1
    width = width_of(of, layer, geometry) or teacher.config.num_labels
    link, generator = find(link or LINKS_OF[of][0]), torch.Generator().manual_seed(3)
    mean, directions = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (width, (width, k)))
    mean = mean - mean.mean() if link.coupled else mean
    fit = Representation(link, mean, conjugate(link, mean, directions), torch.ones(k, dtype=torch.float64), 0.2, 1.0)
    facts = {"width": width, "dataset": "none", "images": 0, "version": "0"}
    return BregmanLayer(fit, Provenance.of_source(Teacher(teacher), of, layer, **facts))
