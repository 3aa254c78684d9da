"""The picture of the conflicts, from plain data."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.evaluation.gradient_rule import gradient_rule_picture


def history(entries=12, scale=0.4, layers=("embeddings", "0", "1", "norm", "head", "objectives")):
    return [
        {
            "step": 10 * (i + 1),
            "cosine": {
                layer: None if layer == "objectives" else scale * np.cos(i / 3 + place)
                for place, layer in enumerate(layers)
            },
            "conflicting": dict.fromkeys(layers),
            "removed": 0.3 + 0.02 * i,
            "whole": {"cosine": -0.1, "conflicting": 0.1 * (i % 5) if scale else None},
            "task_step": None,
        }
        for i in range(entries)
    ]


def colours(path):
    pixels = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {tuple(int(v) for v in colour) for colour in np.unique(pixels, axis=0)}


@pytest.mark.parametrize("entries", [1, 12])
def test_a_picture_is_drawn(tmp_path, entries):
    gradient_rule_picture(json.loads(json.dumps(history(entries))), tmp_path / "rule.png")
    assert Image.open(tmp_path / "rule.png").width > 1000
    found = colours(tmp_path / "rule.png")
    # Red where they conflict and blue where they agree, as deep as each other; grey where a layer has not both.
    assert {(103, 0, 31), (0xDD, 0xDD, 0xDD)} <= found or {(5, 48, 97), (0xDD, 0xDD, 0xDD)} <= found
    assert len(found) > 50


def test_nothing_in_common_and_nothing_at_all(tmp_path):
    only = [entry | {"cosine": {"objectives": None}} for entry in history(3, scale=0)]
    gradient_rule_picture(only, tmp_path / "rule.png")
    assert (0xDD, 0xDD, 0xDD) in colours(tmp_path / "rule.png")
    with pytest.raises(ValueError, match="no history of a gradient rule"):
        gradient_rule_picture([], tmp_path / "rule.png")
