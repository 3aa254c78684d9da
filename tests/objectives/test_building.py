"""Projectors have the student's dtype where it is float64."""

import pytest
import torch

from hf_kdtl.models import Teacher
from tests.support.helpers import Images, trainer
from tests.support.tiny import build


@pytest.mark.parametrize(("student", "expected"), [(torch.float64, torch.float64), (torch.float32, torch.float32)])
def test_a_student_with_a_projector_trains_in_its_own_dtype(tmp_path, student, expected):
    model, teacher = build("vit").to(student), Teacher(build("vit", seed=5, hidden_size=48))
    objectives = [{"name": "task"}, {"name": "hidden_states"}]
    made = trainer(tmp_path, model, teacher, Images(8), objectives, max_steps=2)
    made.train()
    assert {p.dtype for p in made.distiller.objectives.parameters()} == {expected}
    assert next(made.model.parameters()).dtype == student
