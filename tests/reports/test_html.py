"""The report as one HTML file."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from hf_kdtl.reports.html import to_html, write_html
from hf_kdtl.utils.text import escape_markdown, markdown_table

NASTY = "<script>alert(1)</script> a|b **x** [l](http://e.org) `c` & \\ _y_"


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def report(folder):
    Image.new("RGB", (40, 20), (200, 30, 30)).save(folder / "figure.png")
    table = markdown_table([["", "student"], [escape_markdown(NASTY), "93.4 %"]])
    lines = ["# Evaluation on digits", "", "**Verdict: pass.** student: +0.4 points.", "", table, ""]
    lines += ["## Figures", "", "![a figure](figure.png)", "", "- one", f"- {escape_markdown(NASTY)}", ""]
    lines += ["```yaml", "a: <b>", "", "c: **d**", "```", "", "Text with `code` and **bold**."]
    path = folder / "report.md"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_one_file_with_its_figures_that_shows_text_from_outside_as_it_is(tmp_path):
    page = Page(write_html(report(tmp_path)).read_text("utf-8"))
    text = "".join(page.texts)
    assert text.count(NASTY) == 2 and "a: <b>\n\nc: **d**" in text and "93.4 %" in text
    assert not {"script", "a", "b", "link"} & set(page.tags)
    assert {"h1", "h2", "table", "th", "li", "img", "pre", "strong", "code"} <= set(page.tags)
    assert len(page.sources) == 1 and page.sources[0].startswith("data:image/png;base64,")


def test_a_figure_that_is_not_there_is_its_description(tmp_path):
    assert "<img" not in to_html("![a figure](none.png)\n\n![another](/etc/passwd)", tmp_path)


@pytest.mark.slow
def test_a_browser_lays_it_out(tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for path in map(shutil.which, names) if path), None)
    if browser is None:
        pytest.skip("no Chromium is installed: the HTML report was not opened in a browser")
    page = write_html(report(tmp_path))
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,900", f"--screenshot={shot}"]
    subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True, timeout=120, cwd=Path("/"))
    colors = Image.open(shot).convert("RGB").getcolors(10**7)
    red = sum(count for count, (r, g, b) in colors if r > 180 and g < 60 and b < 60)
    assert red > 500  # the figure is drawn, 40 x 20 pixels
