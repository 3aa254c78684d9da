"""The picture of the conflicts, from plain data."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.reports.figures.gradient_rule import gradient_rule_figure


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
            "all_layers": {"cosine": -0.1, "conflicting": 0.1 * (i % 5) if scale else None},
            "task_step": None,
        }
        for i in range(entries)
    ]


def colours(path):
    """The shares of the picture's colours."""
    pixels = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(map(int, colour)): count / len(pixels) for colour, count in zip(found, counts, strict=True)}


RED, BLUE, GREY = (103, 0, 31), (5, 48, 97), (0xDD, 0xDD, 0xDD)


@pytest.mark.parametrize("entries, scale, deepest", [(1, 0.4, BLUE), (12, -0.02, RED)])
def test_a_picture_is_drawn(tmp_path, entries, scale, deepest):
    gradient_rule_figure(json.loads(json.dumps(history(entries, scale))), tmp_path / "rule.png")
    assert Image.open(tmp_path / "rule.png").width > 1000
    found = colours(tmp_path / "rule.png")
    # The farthest from 0 is the deepest, red where they conflict; grey is the row that has not both.
    assert found.get(deepest, 0) > 0.01 and found[GREY] > 0.04
    assert len(found) > 50


def test_nothing_in_common_and_nothing_at_all(tmp_path):
    only = [entry | {"cosine": {"objectives": None}} for entry in history(3, scale=0)]
    gradient_rule_figure(only, tmp_path / "rule.png")
    assert colours(tmp_path / "rule.png")[GREY] > 0.04
    with pytest.raises(ValueError, match="no history of a gradient rule"):
        gradient_rule_figure([], tmp_path / "rule.png")
