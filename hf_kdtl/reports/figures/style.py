"""What all figures share: colors, fonts, and a figure that does not depend on a display."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hf_kdtl.evaluation.records import EvaluatedModel
from hf_kdtl.utils import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with color blindness too (Okabe and Ito).
COLORS = {"teacher": "#7f7f7f", "alone": "#E69F00", "labelled": "#56B4E9", "distilled": "#0072B2"}
# Fonts with Chinese, Japanese, Korean and other glyphs that matplotlib's own font lacks, where installed.
FALLBACK = ("Noto Sans CJK", "Noto Sans", "Noto Serif CJK", "WenQuanYi", "Source Han Sans", "IPAGothic", "IPAexGothic",
            "TakaoGothic", "Droid Sans Fallback", "Unifont", "PingFang", "Hiragino Sans", "Microsoft YaHei", "SimHei",
            "Malgun Gothic", "Arial Unicode MS", "FreeSans", "Lohit", "Noto Naskh", "Segoe UI")  # fmt: skip
MISSING = "\N{REPLACEMENT CHARACTER}"


@cache
def fonts() -> list[str]:
    """The families that text is drawn in: matplotlib's own first, then the fallbacks that are installed."""
    from matplotlib import font_manager

    names = sorted({entry.name for entry in font_manager.fontManager.ttflist})
    return ["DejaVu Sans", *(name for prefix in FALLBACK for name in names if name.startswith(prefix))]


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    paths = {font_manager.findfont(family, fallback_to_default=False) for family in fonts()}
    return frozenset(code for path in paths for code in ft2font.FT2Font(path).get_charmap())


def figure_label(name: str, most: int = 14) -> str:
    """A text from outside for a figure, as `utils.text.figure_label`; what no installed font can draw is a mark."""
    label = text.figure_label(name, most)
    return label if label.isascii() else "".join(c if ord(c) in _glyphs() else MISSING for c in label)


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Text takes the families when it is made, so they are set here and not while drawing. Only appended to. In
    # font.family, glyph by glyph: of font.sans-serif only the first that is installed is drawn in.
    families = matplotlib.rcParams["font.family"]
    matplotlib.rcParams["font.family"] = [*families, *(name for name in fonts() if name not in families)]
    # Not pyplot, which would choose a backend for the program and keep every figure.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a figure, plots without a line above and to the right; where a character could not be drawn, say why."""
    from matplotlib.text import Text

    for axes in figure.axes:
        if not axes.images:
            axes.spines[["top", "right"]].set_visible(False)
    texts = [found.get_text() for found in figure.findobj(Text) if isinstance(found, Text)]
    ticks = [label.get_text() for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    if any(MISSING in one for one in (*texts, *ticks)):
        note = f"{MISSING}: no installed font has this character (Chinese, Japanese, Korean: fonts-noto-cjk)"
        figure.supxlabel(note, fontsize=8, color="#444444")
    figure.savefig(path, dpi=dpi)


def model_colors(models: dict[str, EvaluatedModel]) -> dict[str, str]:
    """A colour for each model: that of its role, and others for further students."""
    more = iter(["#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"] * len(models))
    own = {"teacher": COLORS["teacher"], "baseline": COLORS["alone"]}
    return {name: own.get(model.role) or next(more) for name, model in models.items()}
