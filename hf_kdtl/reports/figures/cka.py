"""CKA between the blocks of two models as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_kdtl.reports.figures.style import new_figure, save


def cka_figure(matrix: Sequence[Sequence[float | None]], path: str | Path) -> None:
    """CKA as a heat map: a row a teacher block (the first at the bottom), a column a student block."""
    values = np.array(matrix, dtype=float)
    rows, columns = values.shape
    figure = new_figure(2.2 + 0.5 * columns, 1.4 + 0.42 * rows)
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")  # a block whose feature is constant
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", origin="lower", interpolation="nearest")
    axes.set(xlabel="student block", ylabel="teacher block", xticks=range(columns), yticks=range(rows))
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="CKA")
    save(figure, path, 130)
