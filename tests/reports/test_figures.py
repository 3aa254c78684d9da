"""What figures show and what they leave out."""

import warnings

import matplotlib
import numpy as np
import pytest
import torch

from hf_kdtl.commands.common.scores import spread
from hf_kdtl.evaluation.records import EvaluatedModel
from hf_kdtl.reports.figures import arms, curves, style
from hf_kdtl.reports.figures.saliency import saliency_figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **options: saved.append(self))
    return saved


def model(*accuracies):
    return EvaluatedModel(runs={str(k): {"test": {"accuracy": value}} for k, value in enumerate(accuracies)})


def test_arms_are_bars_with_intervals_and_the_teacher_is_a_line(figures):
    models = {"teacher": model(0.98), "alone": model(0.90, 0.92), "distilled": model(0.95, 0.96)}
    assert arms.arms_figure(models, {name: name for name in models}, "arms.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([91, 95.5])
    assert axes.get_xlim()[0] == 80 and axes.get_xlim()[1] > 101  # t interval of two seeds
    assert any(line.get_xdata()[0] == pytest.approx(98) for line in axes.lines)
    assert not arms.arms_figure({"alone": model(0.9), "distilled": model(0.95)}, {}, "arms.png")


def test_no_empty_panel(figures):
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_accuracy": 0.5}]
    assert curves.curves_figure({"alone-seed1": log}, "curves.png")
    assert [axes.get_ylabel() for axes in figures[0].axes] == [curves.SHOWN["loss"]]
    assert not curves.curves_figure({"alone-seed1": log[:1]}, "curves.png") and len(figures) == 1


def test_what_no_font_can_draw_is_marked_and_explained(figures, monkeypatch):
    assert style.figure_label("Käse") == "Käse"
    monkeypatch.setattr(style, "_glyphs", lambda: frozenset(map(ord, "abc")))
    assert style.figure_label("猫a") == f"{style.MISSING}a"
    figure = style.new_figure(3, 2)
    figure.subplots().set_title(style.figure_label("猫a"))
    style.save(figure, "figure.png", 50)
    assert "fonts-noto-cjk" in figure._supxlabel.get_text()


def test_maps_lie_over_the_image_on_one_scale(figures):
    flat, peaked = torch.full((2, 2, 2), 0.25), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]] * 2)
    caption = saliency_figure("maps.png", [np.zeros((8, 8, 3))] * 2, {"a": (flat, "x"), "b": (peaked, "y")}, "Where")
    assert "one scale" in caption
    panels = [axes for axes in figures[0].axes if len(axes.images) == 2]  # the image, and the map over it
    assert len(panels) == 4 and {axes.images[1].get_clim() for axes in panels} == {(0, 4)}
    assert panels[0].images[1].get_array().max() == 1 and panels[1].images[1].get_array().max() == 4
    assert figures[0].axes[-1].get_ylabel() == "times the mean of the map"


def test_images_are_spread_over_the_classes():
    labels = [0] * 50 + [1] * 50 + [2] * 2
    rows = spread(labels, 6)
    assert sorted(labels[row] for row in rows) == [0, 0, 1, 1, 2, 2] and rows == spread(labels, 6)
    assert rows != spread(labels, 6, seed=1) and len(set(rows)) == 6


def test_a_character_is_drawn_in_the_first_font_that_has_it(tmp_path, monkeypatch):
    """STIX, which comes with matplotlib, in the place of an installed font of another script."""
    from matplotlib import font_manager, ft2font

    own, other = (
        set(ft2font.FT2Font(font_manager.findfont(name)).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")
    )
    character = chr(min(code for code in other - own if chr(code).isprintable()))
    monkeypatch.setattr(style, "FALLBACK", ("STIXGeneral",))
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    for cached in (style.fonts, style._glyphs):
        cached.cache_clear()
    try:
        assert style.figure_label(character) == character
        figure = style.new_figure(2, 1)
        figure.subplots().set_title(style.figure_label(character))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib's "Glyph missing"
            style.save(figure, tmp_path / "x.png", 50)
    finally:
        for cached in (style.fonts, style._glyphs):
            cached.cache_clear()
