"""hf-kdtl distill without labels: a folder of images and a teacher without a head, then a head from few labels."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, ViTImageProcessor, pipeline

from hf_kdtl import make_student
from hf_kdtl.commands.common.builders import new_processor
from hf_kdtl.data import ImageDataset
from hf_kdtl.data.unlabelled import open_images
from hf_kdtl.evaluation import read_results
from hf_kdtl.export import OnnxModel
from hf_kdtl.hub.model_card import student_card
from hf_kdtl.models import Needs, capture
from hf_kdtl.models.forward.embedding import is_headless
from tests.commands.conftest import CONFIG, QUICK
from tests.data.test_stream import write_shards
from tests.hub.client import hub, in_hub  # noqa: F401
from tests.recipes.test_recipes import STEPS, script
from tests.support.headless import headless
from tests.support.helpers import largest_difference, weights

FLAGS = [
    "--unlabelled",
    "more",
    "--teacher",
    "backbone",
    "--student_config",
    json.dumps(CONFIG),
    "--output_dir",
    "out",
]


@pytest.fixture
def backbone():
    """A teacher without a head, and 24 images in a nested folder."""
    headless("dinov2_with_registers", image_size=16, layers=3).save_pretrained("backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("backbone")
    draw = np.random.default_rng(0)
    Path("more/deep").mkdir(parents=True)
    for number in range(24):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(f"more/deep/{number}.png")


def test_no_labels_anywhere(command, backbone, capsys):
    command("distill").main([*FLAGS, *QUICK, "--teacher_pool", "mean"])
    found = read_results("out")
    assert found["objectives"] == [{"name": "feature_kd"}]
    assert found["data"]["sizes"] == {"train": 21, "held out": 3}
    assert [*found["embedding"]["models"]] == ["teacher", "student before", "student"]
    assert "knn" not in found["embedding"]["models"]["student"]
    curve = found["curves"]["distilled-seed42"]
    assert all(entry["eval_loss"] > 0 for entry in curve if "eval_loss" in entry)
    assert any(
        "embedding of the teacher is the mean of its patch tokens" in note for note in found["pairing"]["notes"]
    )
    assert Path("out/patches.png").is_file() and "patches.png" in Path("out/report.md").read_text()
    assert AutoModel.from_pretrained("out/student").config.model_type == "vit"
    card = student_card(found, model_id="me/features", license="mit")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert (
        'pipeline("image-feature-extraction", model="me/features")' in card.text and "| student before |" in card.text
    )
    seen = pipeline("image-feature-extraction", "out/student", device="cpu")("more/deep/0.png", return_tensors=True)
    assert seen.shape == (1, 5, 32)
    assert "takes a head from few labels" in capsys.readouterr().out


def test_labels_beside_it_serve_knn_and_probe_and_then_a_head(command, backbone, images):
    shutil.copytree(images, "more/too")
    command("distill").main([*FLAGS, *QUICK, "--dataset", images, "--objectives", "feature_kd", "similarity"])
    found = read_results("out")
    scores = found["embedding"]["models"]
    for who in ("teacher", "student before", "student"):
        assert (
            0 <= scores[who]["knn"] <= 1
            and 0 <= scores[who]["probe"] <= 1
            and set(scores[who]["recall"]) == {"1", "5"}
        )
    curve = found["curves"]["distilled-seed42"]
    assert [entry["eval_knn"] for entry in curve if "eval_knn" in entry]
    assert any("of 5 images of test are in unlabelled too, byte for byte" in note for note in found["data"]["notes"])
    assert found["embedding"]["metric"] == "knn" and "linear probe" in Path("out/report.md").read_text()
    command("train_teacher").main(
        ["--model", "out/student", "--dataset", images, "--output_dir", "classifier", *QUICK]
    )
    assert read_results("classifier")["evaluation"]["models"]["teacher"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline", "true"], "baseline is True in a run without labels: it trains the student on its labels"),
        (["--adapter", '{"peft_type": "LORA", "r": 2}'], "adapter is .* in a run without labels"),
        (["--student_layers", "2"], "found student_config and student_layers; expected one of"),
        (["--student_config", '{"model_type": "vit_mae"}'], "ViTModel.from_pretrained"),
        (["--teacher_pool", "pooled"], "pool is 'pooled'; expected 'auto' or 'pooler'"),
        (["--metric_for_best_model", "knn", "--eval_strategy", "steps"], "metric_for_best_model: 'knn'. Valid: loss"),
        (["--gradient_rule", '{"name": "never_hurt"}', "--objectives", "feature_kd"], "protects the task, and none"),
    ],
)
def test_what_has_no_meaning_without_labels_is_refused(command, backbone, flags, message):
    with pytest.raises(ValueError, match=message):
        command("distill").main([*FLAGS, *QUICK, *flags])


def test_preflight_looks_at_the_images_without_labels(command, backbone, capsys):
    command("preflight").main([*FLAGS, "--use_cpu", "true", "--objectives", "feature_kd", "similarity"])
    printed = capsys.readouterr().out
    assert "3 of them are held out" in printed and "Will not run\n  - nothing" in printed
    assert "a step, feature_kd alone = 1.00" in printed and "\n  similarity     " in printed and "task" not in printed
    for name in ("tune", "probe"):
        with pytest.raises(ValueError, match=f"hf-kdtl {name} goes by accuracy, and this is a run without labels"):
            command(name).main([*FLAGS, "--use_cpu", "true"])


def test_a_student_without_a_head_is_evaluated_exported_and_pushed(hub, command, backbone, images, capsys):  # noqa: F811
    pushed = ["--push_to_hub", "true", "--hub_model_id", "tester/features", "--license", "mit"]
    command("distill").main([*FLAGS, *QUICK, *pushed])
    printed = capsys.readouterr().out
    assert "pipeline('image-feature-extraction', 'tester/features')" in printed
    card = ModelCard.load("tester/features")
    assert card.data.pipeline_tag == "image-feature-extraction" and "**As features:** agreement 0" in card.text
    assert "Accuracy" not in card.text and "Difference from its teacher" not in card.text

    flags = ["--models", "out/student", "--teacher", "backbone", "--dataset", images, "--output_dir", "judged"]
    flags += ["--use_cpu", "true", "--per_device_eval_batch_size", "4"]
    assert command("evaluate").main(flags) == 0
    found = read_results("judged")
    assert [*found["embedding"]["models"]] == ["student", "teacher"] and "evaluation" not in found
    mine, its = (found["embedding"]["models"][name] for name in ("student", "teacher"))
    assert {"knn", "probe", "recall", "agreement", "cka"} <= mine.keys() and "agreement" not in its
    assert mine["fingerprint"] == read_results("out")["models"]["student"]["fingerprint"]
    report = Path("judged/report.md").read_text()
    assert "# Evaluation on images" in report and "recall at 5" in report and "patches.png" in report
    assert "recall at 5" in capsys.readouterr().out

    before = read_results("out")
    command("model_card").main(["--runs", "out", "--evaluation", "judged"])
    merged = read_results("out")
    assert [name for name in merged if merged[name] != before[name]] == ["embedding"]
    assert merged["embedding"]["models"]["student"]["knn"] == mine["knn"]
    assert merged["embedding"]["seed"] == before["embedding"]["seed"] == 42
    assert "recall at 5" in Path("out/README.md").read_text()

    command("push").main(
        ["--run", "out", "--hub_model_id", "tester/features", "--license", "mit", "--evaluation", "judged"]
    )
    assert "recall at 5" in ModelCard.load("tester/features", ignore_metadata_errors=True).text
    files = hub.files("tester/features")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= set(files)

    command("export").main(["--student", "out/student", "--output", "student.onnx", "--batch_size", "5"])
    model, pixels = AutoModel.from_pretrained("out/student").eval(), torch.randn(3, 3, 16, 16)
    given = OnnxModel("student.onnx")(pixel_values=pixels)
    with torch.no_grad():
        wanted = capture(model, pixels, Needs(pooled=True))
    torch.testing.assert_close(given["image_embedding"], wanted.pooled)
    torch.testing.assert_close(given["last_hidden_state"], wanted.outputs.last_hidden_state)


def test_a_pipeline_sees_the_pixels_that_the_student_was_trained_on(command, backbone):
    command("distill").main([*FLAGS, *QUICK])
    extractor = pipeline("image-feature-extraction", "out/student", device="cpu")
    seen = extractor.preprocess("more/deep/0.png")["pixel_values"]
    images = open_images("more", notes=[])
    data = ImageDataset(images, new_processor(extractor.model.config))
    row = next(i for i, image in enumerate(images["image"]) if image["path"].endswith("deep/0.png"))
    torch.testing.assert_close(seen[0], data[row]["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_drop", "1"], "max_drop is about accuracy, and a student in student has no head"),
        (["--degradations", "jpeg"], "degradations is about accuracy"),
        (["--split", "validation"], "split is 'validation', and the linear probe"),
        (["--views", "2"], "views is about training images, and nothing is trained here; leave views out"),
        (["--multi_label", "true"], "of one label an image, and the data has several"),
    ],
)
def test_an_evaluation_without_a_head_refuses_what_needs_one(command, images, flags, message):
    headless("vit", image_size=16).save_pretrained("student")
    given = ["--models", "student", "--teacher", "student", "--dataset", images, "--output_dir", "out", *flags]
    with pytest.raises(ValueError, match=message):
        command("evaluate").main(given)


def test_an_evaluation_without_a_head_learns_from_as_few_labels_as_are_typed(command, images, capsys):
    headless("vit", image_size=16).save_pretrained("student")
    flags = ["--models", "student", "--dataset", images, "--output_dir", "out", "--use_cpu", "true"]
    command("evaluate").main([*flags, "--labels_per_class", "2"])
    assert read_results("out")["data"]["sizes"]["train"] == 6
    assert "labelled images of train are used: 2 of each class" in capsys.readouterr().out


def test_labels_beside_a_run_without_labels_are_of_one_an_image(command, backbone, table):
    with pytest.raises(ValueError, match=r"of one label an image, and the data has several.*Leave multi_label out"):
        command("distill").main([*FLAGS, *QUICK, *table, "--objectives", "feature_kd"])


def test_int8_is_refused_without_a_head(command, images):
    headless("vit", image_size=16).save_pretrained("student")
    with pytest.raises(ValueError, match="--int8 is kept by its accuracy on test images, and the student student has"):
        command("export").main(["--student", "student", "--output", "x.onnx", "--int8", "true", "--dataset", images])


def test_the_student_may_be_cut_out_of_a_teacher_without_a_head(command, backbone):
    cut = make_student("backbone", 2)
    assert is_headless(cut) and len(cut.encoder.layer) == 2
    command("distill").main(
        [*FLAGS[:4], "--student_layers", "2", "--output_dir", "out", *QUICK, "--learning_rate", "0"]
    )
    opened = AutoModel.from_pretrained("out/student")
    assert largest_difference(weights(opened), weights(cut)) == 0
    assert read_results("out")["models"]["student"]["start"]["how"] == "cut"


def test_the_recipe_gives_a_student_without_a_head(backbone):
    student = {"model_type": "vit", "image_size": 16, "patch_size": 8} | CONFIG
    made = script("pretrain")("more", "backbone", student, ["feature_kd"], {"flip": True}, "script", **STEPS)
    opened = AutoModel.from_pretrained("script")
    assert torch.equal(opened.layers[0].attention.q_proj.weight, made.layers[0].attention.q_proj.weight)


def test_a_stream_teaches_too(command, backbone, images):
    write_shards("shards", shards=2, rows=24)
    flags = ["--unlabelled", "shards", "--streaming", "true", *FLAGS[2:], *QUICK, "--shuffle_buffer", "8"]
    command("distill").main(
        [*flags, "--validation_fraction", "0.2", "--dataset", images, "--objectives", "feature_kd"]
    )
    found = read_results("out")
    assert found["data"]["sizes"]["held out"] == 4 and "train" not in found["data"]["sizes"]
    assert any("of 2 shards; 4 images of the first one are held out" in note for note in found["data"]["notes"])
    assert 0 <= found["embedding"]["models"]["student"]["knn"] <= 1 and found["embedding"]["images"] == 4
    assert AutoModel.from_pretrained("out/student").config.model_type == "vit"


def test_a_store_teaches_without_labels_as_its_teacher_does_and_no_stream(command, backbone, capsys):
    store = ["--augmentation", '{"flip": true}', "--views", "2", "--teacher_batch", "4"]
    live = ["--augmentation", '{"flip": true}', *QUICK]
    main = command("distill").main
    command("cache").main([*FLAGS[:-2], *store, "--use_cpu", "true", "--output", "store"])
    words = shlex.split(capsys.readouterr().out.split("Train from it:")[1])
    assert "--dataset" not in words and words[words.index("--unlabelled") + 1] == "more"
    main([*words[words.index("distill") + 1 : -2], *QUICK, "--output_dir", "stored"])  # as it is printed
    main([*FLAGS, *live, "--views", "2"])
    one, two = read_results("out"), read_results("stored")
    of = "student/model.safetensors"
    assert Path("stored", of).read_bytes() == Path("out", of).read_bytes()
    assert two["embedding"] == one["embedding"]
    assert any("outputs are read from store" in note for note in two["pairing"]["notes"])
    write_shards("shards", shards=2, rows=24)
    flags = [*FLAGS, *QUICK, "--teacher", "store"]
    with pytest.raises(ValueError, match=r"a store, which is looked up by the row.*stream has none. Name the teacher"):
        main([*flags, "--unlabelled", "shards", "--streaming", "true", "--output_dir", "none"])
    with pytest.raises(ValueError, match="teacher_pool is 'mean', and a store keeps what auto gives"):
        main([*flags, "--teacher_pool", "mean", "--output_dir", "none"])
    assert not Path("none").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "-1"], "--streaming needs --max_steps"),
        (["--shuffle_buffer", "0"], "shuffle_buffer is 0; expected 1"),
        (["--on_bad_image", "skip"], "on_bad_image does not go with --streaming"),
        (["--objectives", "task"], "--streaming is of runs without labels"),
        ([], "streaming reads shards of one kind"),
    ],
)
def test_what_a_stream_cannot_give_is_refused(command, backbone, flags, message):
    with pytest.raises(ValueError, match=message):
        command("distill").main([*FLAGS, *QUICK, "--streaming", "true", *flags])
