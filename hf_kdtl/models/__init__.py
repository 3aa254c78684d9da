"""The models: what they give (capture), and where the teacher's signals come from. Only here are outputs known."""

from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.pairing import PairingPlan, plan
from hf_kdtl.models.student import make_student
from hf_kdtl.models.teachers.teacher import Teacher

__all__ = ["Capture", "Needs", "PairingPlan", "Teacher", "capture", "make_student", "plan"]
