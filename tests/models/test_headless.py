"""Teachers without a head of each family, and students of three: what each objective gives. Makes docs/headless.md."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, plan
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller
from tests.support.headless import headless

PAGE = Path(__file__).parents[2] / "docs" / "headless.md"
TEACHERS = {
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3 (ViT)",
    "dinov3_convnext": "DINOv3 (ConvNeXt)",
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
    "clip": "CLIP, with projection",
    "convnextv2": "ConvNeXt V2",
    "swinv2": "Swin V2",
    "vit_mae": "ViT-MAE",
}
STUDENTS = {"vit": "ViT", "convnext": "ConvNeXt", "mobilenet_v2": "MobileNetV2"}
OBJECTIVES_OF = {
    "feature_kd": {},
    "similarity": {},
    "hidden_states": {},
    "attention_transfer": {},
    "attention_map": {"rows": "all"},
    "relation": {},
    "jacobian": {"of": "embedding"},
}
FAST = [("siglip2", "vit"), ("dinov3_convnext", "convnext")]
SIZE, DRAWS = 64, Draws(0, 0, (0, 1, 2))


def pixels():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))


@cache
def pair(teacher, student):
    """What each objective gives: "yes", "last" (with layers: last), or the sentence that refuses it."""
    source = Teacher(headless(teacher, image_size=SIZE, seed=1))
    mine = headless(student, image_size=SIZE)
    source.match(mine, None, False)
    both = plan(mine, source, pixel_values=pixels())
    found = {}
    for name, options in OBJECTIVES_OF.items():
        found[name] = _given(mine, source, both, name, options)
        if found[name] != "yes" and name in ("hidden_states", "attention_transfer", "attention_map", "relation"):
            again = _given(mine, source, both, name, {**options, "layers": "last"})
            found[name] = "last" if again == "yes" else found[name]
    return both, found


def _given(student, source, both, name, options):
    torch.manual_seed(0)
    try:
        sides = {"teacher": source}, {"teacher": both}
        distiller = Distiller(student, {name: OBJECTIVES[name](**options)}, {name: 1.0}, *sides)
    except ValueError as error:
        return str(error)
    distiller.observe(lambda number: [{"pixel_values": pixels()}])
    value = distiller.terms({"pixel_values": pixels()}, DRAWS)[1][name]
    assert value.shape == (3,) and torch.isfinite(value).all(), (name, value)
    grads = torch.autograd.grad(value.sum(), list(student.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads), (name, "moves nothing")
    assert all(torch.isfinite(g).all() for g in grads if g is not None), name
    return "yes"


EVERY = [
    pytest.param(t, s, marks=() if (t, s) in FAST else pytest.mark.slow, id=f"{t}-{s}")
    for t in TEACHERS
    for s in STUDENTS
]


@pytest.mark.parametrize(("teacher", "student"), EVERY)
def test_features_serve_every_pair_and_the_rest_is_refused_in_words(teacher, student):
    both, found = pair(teacher, student)
    assert found["feature_kd"] == found["similarity"] == found["jacobian"] == "yes", found
    assert found["hidden_states"] in ("yes", "last")
    for name, given in found.items():
        assert given in ("yes", "last") or re.match(rf"objective '{name}': .+\. For this pair these work: ", given), (
            given
        )
    attends = all(model.layers[-1].attention == "full" for model in (both.student, both.teacher))
    assert (found["relation"] in ("yes", "last")) == attends


INTRO = """# Teachers and students without a head

Made by `python -m tests.models.test_headless` (the test-suite fails when this page differs), from tiny random models
on images of 64 x 64 pixels. Any other vision model of transformers is looked at in the same way.

- **embedding**: what the teacher's `pool: auto` takes, where the weights it goes through were in its file.
  **patches**: the grid of its patch tokens after the last norm.
- **each student**: which of `feature_kd`, `similarity`, `hidden_states`, `attention_transfer`, `attention_map` (with
  `rows: all`), `relation` and `jacobian` (with `of: embedding`) work; "(last)" only with `layers: last`. The others
  are refused before training, in a sentence that names what works. What reads class outputs is always refused.
"""


def page():
    lines = [
        INTRO,
        f"| teacher | embedding | patches | {' | '.join(STUDENTS.values())} |",
        f"| {'--- | ' * 6}".strip(),
    ]
    return "\n".join([*lines, *map(line, TEACHERS), ""])


def line(teacher):
    both, _ = pair(teacher, "vit")
    its = both.teacher
    cells = [TEACHERS[teacher], f"{its.pooling}, {its.pooled} wide", f"{its.patches.grid[0]} x {its.patches.grid[1]}"]
    return f"| {' | '.join([*cells, *(_works(pair(teacher, student)[1]) for student in STUDENTS)])} |"


def _works(found):
    if all(given == "yes" for given in found.values()):
        return "all"
    return ", ".join(name + (" (last)" if given == "last" else "") for name, given in found.items()
                     if given in ("yes", "last"))  # fmt: skip


@pytest.mark.slow
def test_the_page_is_what_is_found():
    assert PAGE.read_text() == page(), "python -m tests.models.test_headless"


def test_the_page_names_every_teacher():
    assert all(f"| {name} |" in PAGE.read_text() for name in TEACHERS.values())


if __name__ == "__main__":
    PAGE.write_text(page())
