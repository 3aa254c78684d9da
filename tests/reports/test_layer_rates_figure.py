"""The picture of the layers' rates, from plain data."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.reports.figures.layer_rates import layer_rates_figure


def history(measurements=12, depth=4):
    return [
        {
            "step": 20 * i,
            "multipliers": [0.25 + 3.75 * ((i + layer) % depth) / depth for layer in range(depth)],
            "discrepancies": {"0": 0.1 * i, "2": None if i == 3 else 0.2, "3": 0.3},
        }
        for i in range(measurements)
    ]


@pytest.mark.parametrize("measurements", [1, 12])
def test_a_picture_is_drawn(tmp_path, measurements):
    layer_rates_figure(json.loads(json.dumps(history(measurements))), tmp_path / "rates.png")
    pixels = np.array(Image.open(tmp_path / "rates.png"))
    assert pixels.shape[1] > 1000 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_nothing_measured(tmp_path):
    with pytest.raises(ValueError, match="no history of layer rates"):
        layer_rates_figure([], tmp_path / "rates.png")
