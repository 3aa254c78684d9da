"""A fitted representation: spectrum, explained divergence, and its first directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_kdtl.evaluation.representation import DIRECTIONS
from hf_kdtl.functional.bregman import Representation
from hf_kdtl.reports.figures.style import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


PICTURE = "representation.png"
LABELLED = 20  # bars


def representation_figure(
    path: str | Path,
    fit: Representation,
    shares: Sequence[float],
    names: Sequence[str] = (),
    sheets: Sequence[tuple[Sequence[Any], Sequence[Any]]] = (),
) -> None:
    """Spectrum and explained divergence, and under them the first directions.

    Args:
        path: of the PNG.
        shares: of `explained_by`.
        names: of the outputs (classes): then a direction is shown by its loadings, V's column.
        sheets: else, for each direction, PIL images with its smallest and its largest coefficients.

    Raises:
        ValueError: when neither names nor sheets are given, or the names are not those of the outputs.
    """
    if not sheets and len(names) != len(fit.mean):
        raise ValueError(
            f"found {len(names)} names and no sheets of images; expected {len(fit.mean)} names, or sheets."
        )
    shown = min(DIRECTIONS, fit.directions.shape[1])
    below = 0.75 * shown if sheets else 2.4
    figure = new_figure(10, 3 + below)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3, below])
    above, under = parts
    _curves(above.subplots(1, 2), fit, shares)
    if sheets:
        _sheets(under.subplots(shown, 1, squeeze=False)[:, 0], sheets)
    else:
        _loadings(under.subplots(1, shown, squeeze=False)[0], fit, names)
    save(figure, path, 130)


def _curves(axes: Any, fit: Representation, shares: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(shares) + 1)
    axes[0].bar(numbers, fit.spectrum.cpu().numpy(), color="#7f7f7f")
    axes[0].set(ylabel="mean square of the coefficient", xlabel="direction", title="spectrum")
    axes[1].plot([0, *numbers], [0, *(100 * s for s in shares)], color="#0072B2", marker="o", markersize=3)
    axes[1].set(ylim=(0, 102), xlabel="first directions of this fit", title="divergence explained, %")
    for one in axes:
        one.grid(alpha=0.25)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))


def _loadings(axes: Sequence[Axes], fit: Representation, names: Sequence[str]) -> None:
    for j, one in enumerate(axes):
        values = fit.directions[:, j].cpu().numpy()
        chosen = np.sort(np.argsort(-np.abs(values), kind="stable")[:LABELLED])  # the strongest, in the given order
        one.barh(range(len(chosen)), values[chosen], color=np.where(values[chosen] > 0, "#0072B2", "#E69F00"))
        one.set_yticks(range(len(chosen)), [names[i] for i in chosen] if j == 0 else [], fontsize=7)
        one.invert_yaxis()
        one.axvline(0, color="black", linewidth=0.6)
        one.set_title(f"direction {j + 1}", fontsize=9)


def _sheets(axes: Sequence[Axes], sheets: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> None:
    for j, (one, (low, high)) in enumerate(zip(axes, sheets, strict=True)):
        tiles = [np.asarray(image.convert("RGB").resize((48, 48))) for image in (*low, *high)]
        gap = np.full((48, 24, 3), 255, np.uint8)
        one.imshow(np.concatenate([*tiles[: len(low)], gap, *tiles[len(low) :]], axis=1), interpolation="nearest")
        one.set_axis_off()
        one.set_title(f"direction {j + 1}: smallest | largest coefficients", fontsize=8)
