"""hf-kdtl push and hf-kdtl distill --push_to_hub, against the loopback Hub."""

import getpass
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation.results import read_results
from tests.commands.conftest import CONFIG, QUICK
from tests.hub.client import hub, in_hub  # noqa: F401
from tests.hub.server import TOKEN, Fault
from tests.support.tiny import build

ALLOWED = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "README.md"}
DISTILL = ["--teacher", "teacher", "--dataset", "images", "--output_dir", "out", "--student_layers", "1", *QUICK]


def kept(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_distill_looks_before_it_trains_and_pushes_at_its_end(hub, command, images, teacher, capsys):  # noqa: F811
    flags = [*DISTILL, "--push_to_hub", "true", "--hub_model_id", "tester/small"]

    def distill(*extra):
        code = cli.run(lambda: command("distill").main([*flags, *extra]))
        return code, capsys.readouterr()

    for extra, message in [
        ([], "license is not known (the model card"),
        (["--license", "mit", "--hub_token", "hf_wrong"], "(401): the token is wrong"),
        (["--license", "mit", "--hub_model_id", "other/x"], "(403): this token may not write to other/x"),
        (["--hub_strategy", "checkpoint"], "would publish the training state"),
    ]:
        code, printed = distill(*extra)
        assert code == 2 and message in printed.err and not Path("out").exists()
    assert cli.run(lambda: command("train_teacher").main([*QUICK, "--output_dir", "t", "--push_to_hub", "true"])) == 2
    assert "train-teacher publishes nothing" in capsys.readouterr().err

    # The connection is cut at the end: everything is there, and the command that pushes it.
    hub.fail(Fault("POST", "/commit/", cut="request"))
    code, printed = distill("--license", "mit")
    again = "--run out --hub_model_id tester/small --license mit"
    assert code == 2 and "student distilled" in printed.out
    assert f"complete in out/student. Push it later: hf-kdtl push {again}" in printed.err
    assert hub.messages("tester/small") == ["initial commit"]
    before = kept("out")
    command("push").main(again.split())
    printed = capsys.readouterr().out
    assert "Published: http" in printed and "pipeline('image-classification', 'tester/small')" in printed
    assert hub.messages("tester/small")[1:] == ["Publish the student"] and kept("out") == before
    assert set(hub.files("tester/small")) == ALLOWED | {".gitattributes"}
    card = ModelCard.load("tester/small")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    test = read_results("out")["evaluation"]["models"]["distilled"]["runs"]["42"]["test"]
    assert card.data.license == "mit" and found["accuracy"] == test["accuracy"]
    _the_rest_of_push_student(hub, command("push").main, capsys)


def _the_rest_of_push_student(hub, main, capsys):  # noqa: F811
    """On the run in out/, that is published as tester/small."""

    def push(*extra):
        code = cli.run(lambda: main(["--run", "out", "--hub_model_id", "tester/small", *extra]))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    printed = push()[1]  # also what is no trouble of the Hub says where the student is
    assert "license is not known" in printed
    assert "The student is complete in out/student. Push it later: hf-kdtl" in printed
    assert "Nothing to propose" in push("--license", "mit", "--create_pr", "true")[1]
    assert "Proposed: http" in push("--license", "cc0-1.0", "--create_pr", "true")[1]
    assert "exists and is public" in push("--license", "mit", "--private", "true")[1]
    assert "revision='v2'" in push("--license", "mit", "--revision", "v2")[1]
    results = json.loads(Path("out/results.json").read_text())
    for wrong, message in [
        (results | {"schema": 99}, "schema 99 and this version reads"),
        (results | {"run": {"recipe": "train_teacher"}}, "results are of 'train_teacher'"),
        (results, "its figures would be of another model"),
        (results, "out holds no student; let the run finish"),
    ]:
        if "another model" in message:
            build("vit", image_size=16, layers=3, seed=5).save_pretrained("out/student")
        if "holds no student" in message:
            shutil.rmtree("out/student")
        Path("out/results.json").write_text(json.dumps(wrong))
        code, printed = push("--license", "mit")
        assert code == 2 and message in printed
    Path("out/results.json").unlink()
    assert "out has no results.json" in push()[1]


def test_a_store_is_pushed_and_trained_from_by_its_name(hub, command, images, teacher, capsys):  # noqa: F811
    student = ["--dataset", "images", "--student_config", json.dumps(CONFIG)]
    written = [
        "--teacher",
        "teacher",
        "--views",
        "1",
        "--teacher_batch",
        "8",
        "--use_cpu",
        "true",
        "--output",
        "store",
    ]
    command("cache").main([*student, *written])
    main = command("push").main
    for flags, found in (
        (["--cache", "store"], "found --cache; expected --run"),
        (["--run", "out"], "found --run; expected --run"),
        ([], "found nothing; expected --run"),
        (["--cache", "store", "--repo_id", "a/b", "--run", "out"], "found --run and --cache and --repo_id; expected"),
    ):
        with pytest.raises(ValueError, match=found):
            main(flags)
    assert cli.run(lambda: main(["--cache", "store", "--repo_id", "outputs"])) == 2
    assert "the teacher's license is not known" in capsys.readouterr().err
    main(["--cache", "store", "--repo_id", "outputs", "--license", "mit"])
    printed = capsys.readouterr().out
    assert (
        "Published: http" in printed
        and "distill --teacher tester/outputs --dataset images --student_config" in printed
    )
    Path("mine.yaml").write_text(f"teacher: tester/outputs\ndataset: images\nstudent_config: {json.dumps(CONFIG)}\n")
    command("distill").main(["--config", "mine.yaml", *QUICK, "--output_dir", "named"])
    command("distill").main([*student, "--teacher", "store", *QUICK, "--output_dir", "here"])
    named, here = (load_file(f"{name}/student/model.safetensors") for name in ("named", "here"))
    assert all(named[name].equal(here[name]) for name in here)
    assert "the teacher's outputs are read from tester/outputs" in Path("named/report.md").read_text()


@pytest.mark.slow
def test_the_way_from_own_images_to_a_clone(hub, images, tmp_path):  # noqa: F811
    """The four commands as programs, by a user whose name and folders are marked; then by somebody who clones it."""
    home = tmp_path / "home" / "markeduser"
    home.mkdir(parents=True)
    shutil.move("images", home / "my images")
    data = ["--dataset", str(home / "my images"), *QUICK]
    runs = home / "runs"
    programs = [
        ["train-teacher", "--model_config", json.dumps(CONFIG), *data, "--output_dir", str(runs / "teacher")],
        ["distill", "--teacher", str(runs / "teacher/model"), "--student_layers", "1", *data, "--output_dir",
         str(runs / "student")],
        ["evaluate", "--models", str(runs / "student/student"), "--teacher", str(runs / "teacher/model"),
         *data, "--degradations", "none", "--output_dir", str(runs / "evaluation")],
        ["push", "--run", str(runs / "student"), "--evaluation", str(runs / "evaluation"),
         "--hub_model_id", "me-small", "--license", "apache-2.0"],
    ]  # fmt: skip
    for name, *flags in programs:
        done = in_hub(hub, ["-m", "hf_kdtl", name, *flags], home, USER="markeduser", LOGNAME="markeduser")
        assert done.returncode == 0, done.stderr
    messages = "".join(hub.messages("tester/me-small"))
    for secret in (TOKEN, "markeduser", str(tmp_path), f"/{getpass.getuser()}/"):
        for name, content in (hub.uploaded() | {"messages": messages.encode()}).items():
            assert secret.encode() not in content, (secret, name)
    clone = """
from huggingface_hub import ModelCard, snapshot_download
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
folder = snapshot_download("tester/me-small")
ModelCard.load("tester/me-small").validate()
model = AutoModelForImageClassification.from_pretrained("tester/me-small")
print(sorted(x["label"] for x in pipeline("image-classification", folder)(Image.new("RGB", (9, 9)))))
"""
    done = in_hub(hub, clone, tmp_path / "other")
    assert done.stdout.splitlines()[-1] == "['blue', 'green', 'red']", done.stderr
