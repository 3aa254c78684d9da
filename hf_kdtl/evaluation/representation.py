"""What a representation's directions do, and how much they explain: one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hf_kdtl.functional.bregman import Representation
from hf_kdtl.functional.links import checked, coefficients, pieces

PICTURE = "representation.png"
DIRECTIONS = 4  # that are shown one by one
LABELLED = 20  # bars


def explained_by(fit: Representation, y: Tensor) -> list[float]:
    """The share of the divergence of rows y (n, d) that the first 1, 2, ... k directions take away, in [0, 1].

    With the best coefficients for the directions that are left. A fit of fewer directions would explain more, but
    with the identity, where each is the best of its number.

    Cost: k encodings of y.
    """
    m = fit.mean
    y = checked(y, fit.link, len(m)).to(m.device)
    base, shares = fit.link.divergence(m, y).mean(), []
    for j in range(1, fit.directions.shape[1] + 1):
        v = fit.directions[:, :j]
        c = torch.cat([coefficients(fit.link, v, m, part) for part in pieces(y, j)])
        shares.append(1 - (fit.link.divergence(c @ v.T + m, y).mean() / base).item())
    return shares


def extremes(c: Tensor, owners: Sequence[int], count: int = 6) -> list[tuple[list[int], list[int]]]:
    """For each of the first directions, whose coefficients are the smallest and whose the largest.

    Args:
        c: (n, k).
        owners: of each row, such as the image that a token is of; each is named once.
        count: how many at each end.
    """
    found = []
    for column in c.T[:DIRECTIONS]:
        order = [owners[i] for i in column.argsort().tolist()]
        found.append((list(dict.fromkeys(order))[:count], list(dict.fromkeys(reversed(order)))[:count][::-1]))
    return found


def representation_picture(
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
    figure = Figure(figsize=(10, 3 + below), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[3, below])
    above, under = parts
    _curves(above.subplots(1, 2), fit, shares)
    if sheets:
        _sheets(under.subplots(shown, 1, squeeze=False)[:, 0], sheets)
    else:
        _loadings(under.subplots(1, shown, squeeze=False)[0], fit, names)
    figure.savefig(path, dpi=130)


def _curves(axes: Any, fit: Representation, shares: Sequence[float]) -> None:
    numbers = range(1, len(shares) + 1)
    axes[0].bar(numbers, fit.spectrum.cpu().numpy(), color="#7f7f7f")
    axes[0].set(ylabel="mean square of the coefficient", xlabel="direction", title="spectrum")
    axes[1].plot([0, *numbers], [0, *(100 * s for s in shares)], color="#0072B2", marker="o", markersize=3)
    axes[1].set(ylim=(0, 102), xlabel="first directions of this fit", title="divergence explained, %")
    for one in axes:
        one.grid(alpha=0.25)
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.spines[["top", "right"]].set_visible(False)


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
