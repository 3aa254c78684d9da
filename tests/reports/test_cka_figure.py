"""CKA as a heat map, from plain numbers."""

import numpy as np
from PIL import Image

from hf_kdtl.reports.figures.cka import cka_figure


def test_a_picture_is_drawn(tmp_path):
    cka_figure([[1.0, 0.2, None], [0.3, -0.1, 0.7]], tmp_path / "cka.png")
    pixels = np.array(Image.open(tmp_path / "cka.png"))
    assert pixels.shape[1] > 300 and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
