"""hf-kdtl fit-representation: from a teacher and images to a folder that `bregman` takes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import read_results
from hf_kdtl.evaluation.representation import explained_by, extremes
from hf_kdtl.functional.bregman import fit
from hf_kdtl.models import Teacher
from hf_kdtl.models.bregman.layer import BregmanLayer
from hf_kdtl.objectives.bregman import Bregman
from hf_kdtl.reports.figures.representation import representation_figure

FILES = {"representation.json", "representation.safetensors", "representation.png", "results.json"}


def arguments(*extra):
    k = [] if "--explained" in extra else ["--k", "2"]
    return ["--teacher", "teacher", "--dataset", "images", "--output_dir", "out", "--batch_size", "5", *k, *extra]


@pytest.mark.parametrize(
    ("of", "layer", "width", "rows"),
    [("probabilities", None, 3, 1), ("pooled", None, 32, 1), ("hidden_states", 1, 32, 5), ("attention", 2, 5, 1)],
)
def test_every_kind_of_output(command, images, teacher, capsys, of, layer, width, rows):
    module = command("fit_representation")
    seen = []
    fitting = module.fit
    module.fit = lambda y, *args, **kw: seen.append(torch.cat(list(y))) or fitting(y, *args, **kw)
    try:
        module.main(arguments("--of", of, *([] if layer is None else ["--layer", str(layer)])))
    finally:
        module.fit = fitting
    assert {p.name for p in Path("out").iterdir()} == FILES
    found, model = BregmanLayer.load("out"), Teacher.from_pretrained("teacher").model
    found.check_teacher(Teacher(model))
    was, results = found.provenance, read_results("out")
    number = results["data"]["sizes"]["train"]
    assert (was.of, was.layer, was.width, was.images) == (of, layer, width, number)
    assert was.classes == (["green", "red", "blue"] if of == "probabilities" else None)
    assert seen[0].shape == (number * rows, width) and seen[0].dtype == torch.float32
    expected = fit(seen[0], 2, found.link, tolerance=1e-5)
    assert found.representation.explained == pytest.approx(expected.explained, rel=1e-6)
    section = results["representation"]
    assert section["explained_by_first"][-1] == pytest.approx(section["explained"], abs=1e-6)
    assert results["run"]["settings"]["of"] == of and str(Path.cwd()) not in Path("out/results.json").read_text()
    printed = capsys.readouterr().out
    assert "2 coefficients explain" in printed and '"representation": "out"' in printed
    assert Bregman(representation="out").layer.k == 2


def test_the_rows_are_those_of_the_images(command, images, teacher):
    module = command("fit_representation")
    module.main(arguments("--images", "7", "--k", "1"))
    data = command("common.builders").open_data(command("common.builders").DataOptions(dataset="images"))
    chosen = data.train.shuffle(seed=0).select(range(7))
    source = Teacher.from_pretrained("teacher")
    shown = command("common.builders").pixels(chosen, source.processing_class).__getitems__(list(range(7)))
    y = source.model(pixel_values=torch.stack([row["pixel_values"] for row in shown])).logits.softmax(-1)
    torch.testing.assert_close(
        BregmanLayer.load("out").representation.mean, fit(y, 1, "softmax").mean, rtol=1e-5, atol=1e-5
    )
    one = BregmanLayer.load("out").provenance
    module.main(arguments("--images", "7", "--k", "1", "--batch_size", "3", "--overwrite_output_dir", "true"))
    assert BregmanLayer.load("out").provenance == one and one.images == 7
    module.main(arguments("--images", "8", "--k", "1", "--overwrite_output_dir", "true"))
    assert BregmanLayer.load("out").provenance.dataset != one.dataset


def test_the_picture_shows_the_images_whose_tokens_they_are(command, images, teacher, monkeypatch):
    module, seen = command("fit_representation"), []
    monkeypatch.setattr(module, "SAMPLE", 10)
    monkeypatch.setattr(module, "extremes", lambda c, owners: seen.append((c, owners)) or extremes(c, owners))
    module.main(arguments("--of", "hidden_states", "--layer", "1", "--images", "8"))
    ((c, owners),) = seen  # 40 tokens, 5 an image, of which every fourth
    assert c.shape == (10, 2) and owners == [0, 0, 1, 2, 3, 4, 4, 5, 6, 7]


def test_a_share_instead_of_a_number(command, images, teacher):
    command("fit_representation").main(arguments("--explained", "0.9", "--of", "pooled"))
    found = BregmanLayer.load("out")
    assert found.representation.explained >= 0.9 and found.k > 1


def test_it_goes_on_where_it_was_stopped(command, images, teacher, capsys):
    module = command("fit_representation")
    module.main(arguments("--of", "attention", "--layer", "1"))
    full = BregmanLayer.load("out")
    calls, fitting = [], module.fit

    def stopped(y, k, link, callback, **kw):
        def printed(step, now):
            callback(step, now)
            if step == 0:
                raise KeyboardInterrupt

        return fitting(y, k, link, callback=printed, **kw)

    again = ["--of", "attention", "--layer", "1", "--overwrite_output_dir", "true"]
    module.fit = stopped
    with pytest.raises(KeyboardInterrupt):
        module.main(arguments(*again))
    assert {p.name for p in Path("out").iterdir()} == {
        "results.json",
        "rows.npy",
        "shown.txt",
        "directions.safetensors",
    }
    module.fit = lambda *args, **kw: calls.append(kw["start"]) or fitting(*args, **kw)
    module.write_rows, writing = (
        (lambda teacher, *rest: pytest.fail("ran") if rest[0] is None else writing(teacher, *rest)),
        module.write_rows,
    )
    try:
        module.main(arguments("--of", "attention", "--layer", "1", "--resume", "true"))
    finally:
        module.fit, module.write_rows = fitting, writing
    printed = capsys.readouterr().out
    assert "outputs are there from before" in printed and "resumes from its saved directions" in printed
    assert calls[0].shape == (5, 2) and {p.name for p in Path("out").iterdir()} == FILES
    one, other = full.representation, BregmanLayer.load("out").representation
    assert other.divergence == pytest.approx(one.divergence, rel=1e-3)
    assert BregmanLayer.load("out").provenance == full.provenance


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--of", "logits"], "of is 'logits'; expected 'probabilities'"),
        (["--of", "attention"], "layer is None; attention are of one block"),
        (["--of", "attention", "--layer", "7"], "has the blocks 0 to 2, and attention of block 7 is asked"),
        (["--link", "relu"], "not strictly monotone"),
        (["--explained", "0.9", "--k", "2"], "expected one of --k"),
        (["--teacher", "nowhere/at/all"], "'nowhere/at/all' does not exist"),
        (["--images", "1"], "images is 1, expected 2 to "),
        (["--k", "3"], "k is 3"),
    ],
)
def test_bad_input_is_a_sentence(command, images, teacher, capsys, extra, message):
    main = command("fit_representation").main
    assert cli.run(lambda: main(arguments(*extra))) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert message in error and "Traceback" not in "".join(before)
    assert not Path("out/representation.json").exists()


def test_a_folder_in_use_is_kept(command, images, teacher, capsys):
    main = command("fit_representation").main
    main(arguments())
    before = Path("out/representation.safetensors").read_bytes()
    for extra, message in (
        ([], "out holds another fit. Continue it with --resume true"),
        (["--resume", "true"], "out is finished"),
        (
            ["--resume", "true", "--of", "pooled"],
            "begun with of 'probabilities' and is asked to continue with 'pooled",
        ),
        (["--overwrite_output_dir", "true", "--teacher", "nowhere/at/all"], "does not exist"),
    ):
        assert cli.run(lambda extra=extra: main(arguments(*extra))) == 2
        assert message in capsys.readouterr().err
    assert Path("out/representation.safetensors").read_bytes() == before


# ---- the picture ----


def rows(n=60, d=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).mul(torch.arange(1, d + 1)).softmax(-1)


def test_explained_by_the_first_directions_rises_to_all_of_it():
    y = rows()
    found = fit(y, 3, "softmax")
    shares = explained_by(found, y)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(found.explained, abs=1e-9) and shares[0] > 0.1
    pca = fit(y, 3, "identity")
    assert explained_by(pca, y)[0] == pytest.approx(fit(y, 1, "identity").explained)


def test_extremes_name_each_owner_once():
    c = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 3.0]])
    assert extremes(c, [0, 1, 2, 3], 2) == [([3, 1], [2, 0]), ([0, 1], [2, 3])]
    assert extremes(c, [0, 0, 1, 1], 2) == [([1, 0], [1, 0]), ([0, 1], [0, 1])]


def test_picture_of_loadings_and_of_images():
    from PIL import Image

    y = rows()
    found = fit(y, 3, "softmax")
    shares = explained_by(found, y)
    representation_figure("loadings.png", found, shares, names=list("abcdef"))
    tile = Image.fromarray(np.zeros((8, 8), np.uint8))
    representation_figure("sheets.png", found, shares, sheets=[([tile] * 2, [tile] * 2)] * 3)
    for name in ("loadings.png", "sheets.png"):
        assert Image.open(name).size[0] == 300  # ten inches; drawn coarsely here, 1300 pixels in a report
    with pytest.raises(ValueError, match="found 2 names and no sheets of images; expected 6 names, or sheets"):
        representation_figure("x.png", found, shares, names=["a", "b"])
    assert json.dumps(shares)
