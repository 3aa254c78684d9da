"""DistillationTrainer.push_to_hub: what a script written for Trainer says, and the student alone goes up."""

import getpass
import importlib
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitInfo, ModelCard, __version__, snapshot_download
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageClassification, TrainerCallback, ViTImageProcessor, pipeline

from hf_kdtl import DistillationTrainer
from hf_kdtl.evaluation.results import update_results
from hf_kdtl.hub import upload
from hf_kdtl.hub.upload import HubError, create_commit
from tests.hub.client import hub  # noqa: F401
from tests.hub.server import TOKEN, Fault
from tests.support.helpers import Images, config
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("hub")
ALLOWED = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "README.md"}
PUSH = {"push_to_hub": True, "hub_model_id": "tester/small", "license": "mit", "hub_token": TOKEN}


def trainer(folder="out", callbacks=(), **settings):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4} | settings
    student = build("vit", seed=1)
    student.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    student.config.label2id = {"cat": 0, "dog": 1, "cow": 2}
    return DistillationTrainer(
        student,
        config(folder, **settings),
        teacher=build("vit"),
        train_dataset=Images(),
        callbacks=list(callbacks),
        processing_class=ViTImageProcessor(size={"height": 32, "width": 32}),
    )


def anything(hub):  # noqa: F811
    """Every byte that went up, and every commit message."""
    messages = "".join(message for name in hub.repositories for message in hub.messages(name))
    return b"".join(hub.uploaded().values()) + messages.encode()


def test_a_script_for_trainer_runs_with_our_class(hub, tmp_path):  # noqa: F811
    one = trainer()
    one.train()
    given = {"finetuned_from": "google/vit-base", "tasks": "image-classification", "dataset": "Pets", "tags": "small"}
    commit = one.push_to_hub("Done", dataset_tags="pets", language="en", license="mit", model_name="Small", **given)
    assert isinstance(commit, CommitInfo) and hub.messages("tester/out")[-1] == "Done"
    assert set(hub.files("tester/out")) == ALLOWED | {".gitattributes"}
    for secret in (TOKEN, str(tmp_path), str(Path.home()), f"/{getpass.getuser()}/"):
        assert secret.encode() not in anything(hub)
    folder = snapshot_download("tester/out", local_dir="clone")
    card = ModelCard.load(folder + "/README.md")
    if Version(__version__) >= Version("2"):  # before, the client asks the public Hub whatever the endpoint
        card.validate()
    assert card.data.license == "mit" and card.data.base_model == "google/vit-base" and card.data.language == ["en"]
    assert {"small", "logit_kd"} <= set(card.data.tags) and card.data.datasets == ["pets"]
    assert Path("out/README.md").read_text() == Path("clone/README.md").read_text()
    opened = AutoModelForImageClassification.from_pretrained(folder)
    for name, value in opened.state_dict().items():
        assert value.equal(one.model.state_dict()[name]), name
    answer = pipeline("image-classification", folder)(Image.new("RGB", (32, 32)))
    assert {entry["label"] for entry in answer} == {"cat", "dog", "cow"}
    # In the background, private from the start, and proposed to somebody else.
    future = one.push_to_hub("Later", blocking=False, license="mit")
    assert future.result().oid and one.push_in_progress.is_done()
    hub.add("other/model")
    one.args.hub_model_id = "other/model"
    assert one.push_to_hub(create_pr=True, license="mit").pr_revision == "refs/pr/1"


def test_during_training_every_save_goes_up_and_nothing_else(hub):  # noqa: F811
    one = trainer(**PUSH, save_strategy="steps", save_steps=1, save_total_limit=1, hub_always_push=True)
    assert list(hub.repositories) == ["tester/small"]  # at construction, before any training
    one.train()
    messages = ["initial commit", "Training in progress, step 1", "Training in progress, step 2"]
    assert hub.messages("tester/small") == messages
    assert set(hub.files("tester/small")) == ALLOWED | {".gitattributes"}
    assert one.push_in_progress.is_done()
    first, second = (c.files["model.safetensors"] for c in hub.repositories["tester/small"].branches["main"][1:])
    assert first != second == Path("out/checkpoint-2/model.safetensors").read_bytes()
    one.save_model()  # as Trainer's: a user's own save is pushed
    assert hub.messages("tester/small")[-1] == "Model save"
    assert TOKEN.encode() not in anything(hub)


def test_a_slow_push_is_not_overtaken_by_the_next(hub, monkeypatch):  # noqa: F811
    """Together they would end in any order, and one that fails would close the other's connection."""
    begun = []

    def slow(staged, name, token, revision, message, *more):
        begun.append(message)
        if message.endswith("step 1"):
            time.sleep(0.5)
            assert begun == [message]
        return create_commit(staged, name, token, revision, message, *more)

    monkeypatch.setattr(upload, "create_commit", slow)
    trainer(**PUSH, save_strategy="steps", save_steps=1, hub_always_push=True).train()
    assert hub.messages("tester/small")[1:] == begun == [f"Training in progress, step {step}" for step in (1, 2)]


def test_at_the_end_only(hub):  # noqa: F811
    one = trainer(**PUSH, save_strategy="steps", save_steps=1, hub_strategy="end")
    one.train()
    assert hub.messages("tester/small") == ["initial commit"]
    one.push_to_hub()
    assert hub.messages("tester/small")[1:] == ["End of training"]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_training_state_is_refused_by_name(strategy):
    with pytest.raises(
        ValueError, match=f"hub_strategy is '{strategy}', which would publish the training state.*every_"
    ):
        config("out", push_to_hub=True, hub_strategy=strategy)


class Break(TrainerCallback):
    """Something happens to the Hub after the first step."""

    def __init__(self, happen):
        self.happen = happen

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.happen()


@pytest.mark.parametrize(
    "fault", [Fault("POST", "/commit/", 403, times=9), Fault("POST", "/commit/", cut="request"), None]
)
def test_a_push_that_fails_is_reported_and_training_continues(hub, fault, caplog):  # noqa: F811
    happen = hub.stop if fault is None else lambda: hub.fail(fault)
    saving = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    one = trainer(callbacks=[Break(happen)], **PUSH, **saving)
    one.train()
    assert one.state.global_step == 2 and Path("out/checkpoint-2/model.safetensors").is_file()
    notes = [record.getMessage() for record in caplog.records if record.name == "hf_kdtl.trainer.publishing"]
    assert notes[0].startswith("the push of step 1 failed, training continues: the Hub")
    if fault is None:
        with pytest.raises(HubError, match="could not be reached") as caught:
            one.push_to_hub()
        assert "--run out --hub_model_id tester/small --license mit, or trainer.push_to_hub()." in str(caught.value)
        AutoModelForImageClassification.from_pretrained("out")
        assert Path("out/results.json").is_file()  # for the command
    elif fault.times == 0:
        assert hub.messages("tester/small")[1:] == ["Training in progress, step 2"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hub_token": "hf_wrong"}, r"\(401\): the token is wrong"),
        ({"hub_model_id": "other/small"}, r"\(403\): this token may not write to other/small"),
        ({"hub_model_id": "tester/bert"}, "tester/bert exists and holds config.json"),
        ({"license": None}, "teacher's license is not known"),
    ],
)
def test_what_cannot_be_published_is_reported_before_training(hub, settings, sentence):  # noqa: F811
    hub.add("tester/bert", {"config.json": b"{}"})
    with pytest.raises((ValueError, OSError), match=sentence):
        trainer(**PUSH | settings)
    assert "tester/small" not in hub.repositories


def test_without_a_teacher_nothing_is_reported_of_its_license(hub):  # noqa: F811
    settings = PUSH | {"objectives": [{"name": "task"}], "max_steps": 1}
    for asked in ({}, {"license": "apache-2.0"}):
        made = lambda: DistillationTrainer(build("vit"), config("out", **(settings | {"license": None} | asked)),  # noqa: E731, B023
                                           train_dataset=Images())  # fmt: skip
        if asked:
            made()
            continue
        with pytest.raises(ValueError, match=r"no license was chosen.*no teacher.*license=\"apache-2.0\"") as refused:
            made()
        assert "teacher's" not in str(refused.value)


def test_the_license_of_a_gated_teacher_is_read_and_kept_to(hub):  # noqa: F811
    build("vit").save_pretrained("local")
    files = {path.name: path.read_bytes() for path in Path("local").iterdir()}
    hub.add("tester/teacher", files | {"README.md": b"---\nlicense: cc-by-nd-4.0\n---\n"}, readers=["tester"])

    def taught(teacher="tester/teacher", **settings):
        settings = {"max_steps": 1} | PUSH | settings
        return DistillationTrainer(build("vit", seed=1), config("out", **settings), teacher=teacher,
                                   train_dataset=Images())  # fmt: skip

    with pytest.raises(ValueError, match=r"cc-by-nd-4\.0, which allows no derivatives"):
        taught()
    hub.repositories["tester/teacher"].commit("main", "m", files | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
    with pytest.raises(ValueError, match="would loosen it"):
        taught()
    one = taught(license=None)
    one.push_to_hub()
    card = ModelCard(hub.files("tester/small")["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == "tester/teacher"
    hub.add("tester/locked", files, readers=[])
    with pytest.raises(OSError, match="gated"):
        taught(teacher="tester/locked")


def test_nothing_that_is_wrong_with_a_push_stops_training(hub, monkeypatch, caplog):  # noqa: F811
    one = trainer(**PUSH, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("hf_kdtl.hub.staging.stage_student", lambda *_: [][0])
    one.train()
    assert one.state.global_step == 2 and "the push of step 2 failed, training continues: list index" in caplog.text


def test_one_push_at_a_time(hub):  # noqa: F811
    class Busy:
        waited = 0

        def is_done(self):
            return self.waited > 0

        def wait_until_done(self):
            self.waited += 1

    one = trainer(**PUSH, save_strategy="steps", save_steps=1)
    one.push_in_progress = busy = Busy()
    one._push_from_checkpoint("out")
    assert hub.messages("tester/small") == ["initial commit"]
    one.push_to_hub()
    assert busy.waited == 1 and hub.messages("tester/small")[1:] == ["End of training"]


def lora(base):
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))


def test_an_adapter_that_taught_itself_goes_up_later(hub, monkeypatch):  # noqa: F811
    build("vit").save_pretrained("local")
    files = {path.name: path.read_bytes() for path in Path("local").iterdir()}
    hub.add("tester/base", files | {"README.md": b"---\nlicense: mit\n---\n"})

    def made(base, **settings):
        return DistillationTrainer(lora(base), config("out", max_steps=1, **PUSH | {"license": None} | settings),
                                   teacher="self", train_dataset=Images())  # fmt: skip

    for base, sentence in ((build("vit"), "a model without a name"), ("local", "'local', a folder of this machine")):
        base = AutoModelForImageClassification.from_pretrained(base) if base == "local" else base
        with pytest.raises(ValueError, match=f"an adapter on {sentence}.* or merge"):
            made(base, license="mit")
    assert list(hub.repositories) == ["tester/base"]
    hub.log.clear()
    lookups = 2 if Version(__version__) >= Version("2") else 3
    one = made(AutoModelForImageClassification.from_pretrained("tester/base"), save_strategy="steps", save_steps=1)
    one.train()
    assert (
        sum("tester/base/resolve/main/README.md" in line for line in hub.log) <= lookups
    )  # and not again at each save
    hub.fail(Fault("POST", "/commit/", 503, times=1))
    with pytest.raises(HubError, match=r"\(503\).*hf-kdtl push --run out --hub_model_id tester/small, or"):
        one.push_to_hub()
    importlib.import_module("hf_kdtl.commands.push").main(["--run", "out", "--hub_model_id", "tester/small"])
    mine = {"adapter_config.json", "adapter_model.safetensors", "README.md", "results.json", ".gitattributes"}
    assert set(hub.files("tester/small")) == mine
    card = ModelCard(hub.files("tester/small")["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model == "tester/base"


@pytest.mark.parametrize("content", ["{", '{"schema": 9}'])
def test_results_that_cannot_be_read_are_reported_before_training_and_stop_none(hub, content, caplog):  # noqa: F811
    one = trainer(**PUSH, save_strategy="steps", save_steps=1)
    Path("out").mkdir(exist_ok=True)
    Path("out/results.json").write_text(content)
    one.train()
    assert (
        one.state.global_step == 2 and "the push of step 2 failed, training continues: out/results.json" in caplog.text
    )
    with pytest.raises(ValueError, match=r"out/results\.json (is not valid JSON|has schema 9)"):
        trainer(**PUSH)


def test_what_a_recipe_wrote_of_another_student_stays(hub):  # noqa: F811
    for section, value in (("run", {"recipe": "distill"}), ("models", {"student": {"fingerprint": "another"}})):
        update_results("out", section, value)
    before = Path("out/results.json").read_bytes()
    one = trainer(**PUSH)
    hub.fail(Fault("POST", "/commit/", 503, times=1))
    with pytest.raises(HubError, match=r"The student is saved in out: call trainer\.push_to_hub\(\) again\.$"):
        one.push_to_hub()
    assert Path("out/results.json").read_bytes() == before
    one.push_to_hub()
    assert b'"recipe": null' in hub.files("tester/small")["results.json"]


def test_the_first_push_may_be_a_proposal_in_the_background(hub):  # noqa: F811
    hub.add("other/model")
    one = trainer(hub_model_id="other/model", license="mit")
    one.state.log_history.append({"eval_loss": float("nan"), "step": 0})
    assert one.push_to_hub(create_pr=True, blocking=False).result().pr_revision == "refs/pr/1"
    files = hub.files("other/model", "refs/pr/1")
    assert b'model="other/model"' in files["README.md"] and b"NaN" not in files["results.json"]
    hub.add("tester/small").commit("v1", "m", {"model.safetensors": b"precious"})
    one.args.hub_model_id = "tester/small"
    with pytest.raises(ValueError, match=r"tester/small \(branch v1\) exists and holds"):
        one.push_to_hub(revision="v1")


def test_a_card_alone_may_leave_the_license_open():
    one = trainer()
    one.create_model_card(finetuned_from="/data/zoe/x")
    card = ModelCard.load("out/README.md")
    assert card.data.license is None and "not determined" in card.text and "zoe" not in str(card)
    with pytest.raises(ValueError, match=r"DistillationConfig\(license="):
        one.push_to_hub()
