"""A picture of how fast each layer learned, and how far it was from its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_kdtl.reports.figures.style import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LAYER_RATES = "layer_rates.png"


def layer_rates_figure(history: Sequence[dict[str, Any]], path: str | Path, bounds: tuple[float, float] = (0.25, 4.0)):
    """Two heat maps, optimizer steps by blocks: the multipliers, and under them the discrepancies.

    Args:
        history: entries {"step", "multipliers": [one a block], "discrepancies": {block: nats, None if not finite}}.
        path: of the PNG.
        bounds: r_min and r_max, the ends of the colours.

    Raises:
        ValueError: when nothing was measured.
    """
    from matplotlib.colors import LogNorm

    if not history:
        raise ValueError("there is no history of layer rates to draw: the mode measures nothing, or no step was made.")
    steps = [entry["step"] for entry in history]
    multipliers = np.array([entry["multipliers"] for entry in history], dtype=float).T
    found = np.full(multipliers.shape, np.nan)
    for column, entry in enumerate(history):
        for layer, value in entry["discrepancies"].items():
            found[int(layer), column] = np.nan if value is None else value
    figure = new_figure(9, 2.6 + 0.3 * len(multipliers))
    above, below = figure.subplots(2, 1, sharex=True)
    # Around 1 on a logarithmic scale: half and double the rate are equally far from white.
    farthest = max(*bounds, *(1 / b for b in bounds))
    norm = LogNorm(1 / farthest, farthest)
    _map(figure, above, multipliers, "multiplier of the rate", steps, cmap="RdBu_r", norm=norm)
    # Discrepancies fall by orders of magnitude; on a linear scale the end of a run would be one colour.
    positive = found[found > 0]
    spread = len(positive) > 0 and positive.max() > positive.min()
    falls = LogNorm(positive.min(), positive.max()) if spread else None
    _map(figure, below, found, "discrepancy (nats)", steps, cmap="viridis", norm=falls)
    below.set_xlabel("optimizer step of the measurement")
    save(figure, path, 130)


def _map(figure: Figure, axes: Axes, values: np.ndarray, label: str, steps: Sequence[int], **colours: Any) -> None:
    axes.set_facecolor("#dddddd")  # a block that was not measured
    image = axes.imshow(values, aspect="auto", interpolation="nearest", origin="lower", **colours)
    axes.set_ylabel("block")
    axes.set_yticks(range(len(values)))
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(9, len(steps)))})
    axes.set_xticks(shown, [str(steps[i]) for i in shown])
    bar = figure.colorbar(image, ax=axes, label=label)
    if label.startswith("multiplier"):
        ticks = [t for t in (0.25, 0.5, 1.0, 2.0, 4.0) if image.norm.vmin <= t <= image.norm.vmax]  # type: ignore[operator]
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.ax.minorticks_off()
