"""Importing the trainer loads what transformers' Trainer loads, this package, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, sys
from transformers import Trainer
before = {name.split(".")[0] for name in sys.modules}
from hf_kdtl import DistillationConfig, DistillationTrainer, make_student
modules = sorted(sys.modules)
print(json.dumps([sorted({name.split(".")[0] for name in modules} - before), modules]))
"""


def test_only_what_training_needs_is_loaded():
    ran = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    added, modules = json.loads(ran.stdout)
    assert added == ["hf_kdtl"]
    own = {name.split(".")[1] for name in modules if name.startswith("hf_kdtl.")}
    assert not own & {"hub", "reports", "evaluation", "commands", "export"}
