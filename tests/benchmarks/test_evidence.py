"""The evidence: runs are kept and not repeated, weights are chosen on validation, pages are what the lines give."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from benchmarks.evidence import comparison, report, small_pages
from benchmarks.evidence.few_labels_many_images import shuffled
from benchmarks.evidence.gradients import AnswersAndGradients, gradients_of
from benchmarks.evidence.maps import AnswersAndMaps, maps_of
from benchmarks.evidence.robust_students import RADIUS, attacked, right, spread_images
from benchmarks.evidence.runs import RESULTS, Run, Table
from benchmarks.evidence.small_vgg import SmallVGGConfig, SmallVGGForImageClassification
from benchmarks.evidence.students import small_bit
from benchmarks.evidence.views import Views, answers, as_seen, normalised, resized, shown_to
from hf_kdtl.functional.features import attention_transfer
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher
from hf_kdtl.models.forward.capture import capture
from hf_kdtl.models.forward.needs import Needs
from hf_kdtl.objectives import Jacobian
from hf_kdtl.objectives.paired import patches


def line(arm, weight, seed, validation, test):
    return {"table": "t", "setting": "s_4", "arm": arm, "weight": weight, "seed": seed, "validation": validation,
            "test": test, "cpu_seconds": 3600.0}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in report.TABLES if (RESULTS / f"{name}.jsonl").exists()])
def test_each_page_is_what_its_runs_give(name):
    file = RESULTS / f"{name}.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert file.with_suffix(".md").read_text() == report.written(name, lines)


def test_a_map_of_one_channel_serves_attention_transfer_as_the_features_do(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    teacher = Teacher(
        ResNetForImageClassification(config), processing_class=ViTImageProcessor(size={"height": 32, "width": 32})
    )
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 32, 32), np.uint8)
    seen = as_seen(teacher, pixels.reshape(-1, 3, 32, 32))
    source = AnswersAndMaps(
        torch.zeros(10, 3), maps_of(teacher, pixels, (0, 1), tmp_path / "m.npz"), teacher.geometry(seen)
    )
    rows, needs = torch.tensor([7, 2]), Needs(logits=True, hidden_states=frozenset({0, 1}))
    held, live = source.capture(seen[rows], needs, {"image_index": rows}), teacher.capture(seen[rows], needs)
    assert source.unserved(needs) == ""
    assert "only logits and maps" in source.unserved(Needs(hidden_states=frozenset({2})))
    for block, grid in ((0, (8, 8)), (1, (4, 4))):
        mine = torch.randn(2, grid[0] * grid[1], 6)
        theirs = [patches(found.hidden_states[block], source.known.layers[block]) for found in (held, live)]
        values = [attention_transfer(mine, its, grid, grid, "code") for its in theirs]
        torch.testing.assert_close(*values, rtol=2e-3, atol=0)  # float16
        assert values[1].min() > 0


def test_stored_gradients_serve_jacobian_as_the_teacher_does(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 1.0]
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std)
    teacher = Teacher(ResNetForImageClassification(config), processing_class=processor)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 16, 16), np.uint8)
    logits = torch.from_numpy(answers(teacher, pixels.reshape(-1, 3, 16, 16)))
    source = AnswersAndGradients(logits, gradients_of(teacher, pixels, logits, tmp_path / "g.npy"))
    term, rows = Jacobian(), torch.tensor([7, 2])
    mine, its = (needs | Needs(logits=True) for needs in term.needs(None))
    assert source.unserved(its) == "" and "only logits and their gradients" in source.unserved(mine)
    x = torch.stack([normalised(p) for p in pixels.reshape(-1, 3, 16, 16)[rows]])
    batch = {"image_index": rows, "draws": Draws(0, 0, (0, 1))}
    live = capture(teacher.classifier(), x, its, shown=lambda x: shown_to(teacher, (x + 1) / 2))
    student = capture(small_bit(3, 1), x, mine)
    values = [term(student, found, batch) for found in (source.capture(x, its, batch), live)]
    torch.testing.assert_close(*values, rtol=2e-3, atol=0)  # float16
    assert values[1].min() > 0.1


def test_a_run_is_done_once_and_kept(tmp_path):
    done = []

    def measure(run):
        done.append(run)
        return {"validation": run.weight, "test": 0.5}

    assert Table("t", measure, tmp_path).taken("s", "a", (1.0, 3.0, 2.0), (1, 2, 3))[2]["weight"] == 3.0
    again = Table("t", measure, tmp_path).taken("s", "a", (1.0, 3.0, 2.0), (1, 2, 3))
    assert [found["seed"] for found in again] == [1, 2, 3]
    assert len(done) == 3 * 2 + 1  # three values for two seeds, the chosen one for the third
    with pytest.raises(AssertionError, match="has not been done"):
        Table("t", folder=tmp_path).once(Run("s", "a", 3.0, 9))


def test_the_weight_is_chosen_on_validation_by_the_first_two_seeds_alone():
    lines = [line("a", 1.0, 1, 0.6, 0.1), line("a", 1.0, 2, 0.6, 0.2), line("a", 1.0, 3, 0.0, 0.3)]
    lines += [line("a", 2.0, 1, 0.7, 0.9), line("a", 2.0, 2, 0.4, 0.9)]
    (runs,) = comparison.arm_runs(lines)
    assert (runs.weight, runs.test) == (1.0, {1: 10.0, 2: 20.0, 3: 30.0})


def test_differences_are_paired_by_seed():
    runs = comparison.arm_runs([line("a", 1.0, s, 0.5, 0.5 + s / 100) for s in (1, 2, 3)])
    runs += comparison.arm_runs([line("b", 1.0, s, 0.5, 0.4 + s / 100 + s / 1000) for s in (3, 2, 1)])
    table = comparison.comparison_table(runs, {"s_4": "s_4/a"})
    # d = -10 + 0.1 s: mean -9.8, sd 0.1, t(2) 4.303 / sqrt(3)
    assert "-9.80 (-10.05 to -9.55)" in table


def test_labels_worth_interpolates_the_logarithm():
    assert report.labels_worth(50.0, [10, 1000], [40.0, 60.0]) == "100"
    assert report.labels_worth(61.0, [10, 1000], [40.0, 60.0]) == "more than 1000"


def test_the_answer_belongs_to_the_view_that_was_shown():
    pixels = np.arange(5 * 3, dtype=np.uint8).reshape(5, 3, 1, 1, 1).repeat(3, axis=2)  # value = 3 image + view
    images = Views(pixels, np.zeros(4), np.array([4, 2, 1, 0]), None, 0)
    for _ in range(4):
        shown = images.__getitems__([0, 3, 1])
        values = [round(float(127.5 * (item["pixel_values"][0, 0, 0] + 1))) for item in shown]
        assert values == [images.source_index(i) for i in (0, 3, 1)]
    before = images.__getitems__([0])[0]["pixel_values"]
    assert not torch.equal(before, images.__getitems__([0])[0]["pixel_values"])


def test_shuffled_answers_are_another_images_view_by_view():
    logits = torch.arange(12.0).reshape(6, 2)  # 3 images, 2 views
    mixed = shuffled(logits, 3, seed=2).reshape(3, 2, 2)
    rows = [logits.reshape(3, 2, 2).tolist().index(image.tolist()) for image in mixed]
    assert sorted(rows) == [0, 1, 2] and rows != [0, 1, 2]


def test_pixels_made_smaller_are_those_of_pil():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8)
    expected = [np.asarray(Image.fromarray(p.transpose(1, 2, 0)).resize((32, 32))).transpose(2, 0, 1) for p in pixels]
    assert np.abs(resized(pixels, 32).astype(int) - np.stack(expected)).max() <= 1
    assert resized(pixels, 64) is pixels


def test_an_attack_stays_within_its_radius_and_raises_the_loss_of_each_image():
    torch.manual_seed(0)
    model = SmallVGGForImageClassification(SmallVGGConfig(hidden_sizes=[8], depths=[1], num_labels=4)).eval()
    pixels, labels = 2 * torch.rand(6, 3, 8, 8) - 1, torch.arange(6) % 4
    pixels[0] = 1.0
    found = attacked(model, pixels, labels)
    assert (found - pixels).abs().max() <= RADIUS + 1e-6 and found.abs().max() <= 1
    losses = [torch.nn.functional.cross_entropy(model(x).logits, labels, reduction="none") for x in (pixels, found)]
    assert (losses[1] > losses[0]).all()
    with torch.inference_mode():
        chosen = model(pixels).logits.argmax(-1)
    assert right(model, pixels, chosen) == 1.0 and right(model, pixels, (chosen + 1) % 4) == 0.0


def test_the_images_of_a_score_are_spread_over_the_split():
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1, 1).repeat(3, axis=2)
    _, labels = spread_images(Views(pixels, np.arange(10), np.arange(10), None, 0), 4)
    assert labels.tolist() == [0, 3, 6, 9]


def run(term, weight, seed, validation, test, rate=1e-3):
    return {"set": "a", "term": term, "weight": weight, "learning_rate": rate, "seed": seed, "validation": validation,
            "test": test, "measured": 0.5 if weight == "auto" else None}  # fmt: skip


def test_the_tuned_weight_is_that_of_validation_and_scored_with_other_seeds():
    lines = [run("none", 0, 11, v, 0.9, rate) for rate, v in ((1e-3, 0.3), (2e-3, 0.4))]
    lines += [run("none", 0, s, 0, 0.2, 2e-3) for s in (1, 2)] + [run("none", 0, 1, 0, 0.9, 1e-3)]
    for weight, validation, tests in ((1.0, 0.5, (0.3, 0.4)), (10.0, 0.6, (0.5, 0.6)), ("auto", 0.0, (0.4, 0.6))):
        lines += [run("kd", weight, 1 + i, 0.0, test) for i, test in enumerate(tests)]
        lines += [run("kd", weight, 11, validation, 0.0)] if weight != "auto" else []
    page = small_pages.auto_weight(lines)
    assert "a, learning rate 0.002" in page
    cells = [cell.strip() for cell in page.splitlines()[-1].strip("|").split("|")]
    assert cells[:5] == ["kd", "20.0 ± 0.0", "35.0 ± 7.1", "55.0 ± 7.1", "50.0 ± 14.1"]
    assert cells[5].startswith("+15.0 (") and cells[6].startswith("-5.0 (") and cells[7:] == ["10", "0.5 to 0.5"]


def test_the_cutting_page_leaves_trials_out():
    common = {"steps": 500, "share": 0.5, "flops": 0.5, "parameters": 10**6, "before": 0.1}
    lines = [{"arm": "teacher", "steps": 500, "before": 0.68, "parameters": 3 * 10**6, "test_images": 2000}]
    lines += [common | {"arm": "depth", "seed": s, "after": 0.4 + s / 100} for s in (1, 2)]
    lines += [common | {"arm": "width", "seed": s, "after": 0.5 + s / 50} for s in (1, 2)]
    page = small_pages.cut([*lines, common | {"arm": "width", "seed": 1, "after": 0.9, "steps": 40}])
    assert "3.00 M parameters, 68.0 % on the same 2,000 test images" in page
    cells = [cell.strip() for cell in page.splitlines()[-1].strip("|").split("|")]
    assert cells == ["50.0%", "width", "1.00", "2", "10.0 ± 0.0", "53.0 ± 1.4", "+11.5 (+5.1 to +17.9)"]


def test_what_the_probe_says_of_itself_is_what_was_measured():
    from hf_kdtl.commands.probe import MEASURED

    found = (RESULTS / "probe_reliability.md").read_text().split("Rank correlation")[-1]
    rank, settings, right = re.findall(r"[\d.]*\d", found)[:3]
    assert f"in {settings} settings" in MEASURED and f"right in {right} of {settings}" in MEASURED and rank in MEASURED
