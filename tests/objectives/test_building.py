"""Projectors have the student's dtype where it is float64, and float32 else, whatever the student gives them."""

import pytest
import torch

from hf_kdtl.models import Teacher
from tests.support.helpers import Images, trainer
from tests.support.tiny import build


@pytest.mark.parametrize(
    ("student", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_a_student_with_a_projector_trains_in_its_own_dtype(tmp_path, student, expected):
    model, teacher = build("vit").to(student), Teacher(build("vit", seed=5, hidden_size=48))
    objectives = [{"name": "task"}, {"name": "hidden_states"}]
    made = trainer(tmp_path, model, teacher, Images(8), objectives, max_steps=2)
    made.train()
    assert {p.dtype for p in made.distiller.objectives.parameters()} == {expected}
    assert next(made.model.parameters()).dtype == student


@pytest.mark.parametrize("objective", ["feature_kd", "similarity", "hidden_states", "lwf"])
@pytest.mark.filterwarnings("ignore")
def test_under_bf16_full_eval_a_projector_reads_the_student_that_trainer_casts(tmp_path, objective):
    teacher, entries = build("vit", seed=5, hidden_size=48), [{"name": "task"}, {"name": objective}]
    settings = {"eval_objectives": True, "max_steps": 1}
    found = []
    for full_eval in (False, True):
        made = trainer(tmp_path, build("vit"), teacher, Images(8), entries, bf16_full_eval=full_eval, **settings)
        found.append(made.evaluate(Images(8)))
    assert next(made.model.parameters()).dtype == torch.bfloat16  # Trainer's doing
    for key in ("eval_loss", f"eval_{objective}"):
        assert found[1][key] == pytest.approx(found[0][key], rel=0.02)
    made.train()
    assert {p.dtype for p in made.distiller.objectives.parameters()} == {torch.float32}
