"""What all figures share: colors, and a figure that does not depend on a display."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_kdtl.evaluation.records import EvaluatedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by colour-blind eyes too (Okabe and Ito).
COLORS = {"teacher": "#7f7f7f", "alone": "#E69F00", "labelled": "#56B4E9", "distilled": "#0072B2"}


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which would choose a backend for the whole program and keep every figure.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def model_colors(models: dict[str, EvaluatedModel]) -> dict[str, str]:
    """A colour for each model: that of its role, and others for further students."""
    more = iter(["#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"] * len(models))
    own = {"teacher": COLORS["teacher"], "baseline": COLORS["alone"]}
    return {name: own.get(model.role) or next(more) for name, model in models.items()}
