"""Figures for tests that do not look at them: drawn by the same code, at a few pixels an inch and without a layout."""

import pytest


@pytest.fixture
def coarse_figures(monkeypatch):
    """Every artist still draws, so that a figure that cannot be drawn fails; finding places for labels, and drawing
    at the resolution of a report, is what takes the time."""
    from matplotlib.figure import Figure

    save = Figure.savefig

    def coarse(self, path, **options):
        self.set_layout_engine("none")
        save(self, path, dpi=30)

    monkeypatch.setattr(Figure, "savefig", coarse)
