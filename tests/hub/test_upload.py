"""A finished run folder goes to the Hub: what goes up, and what a user sees when the Hub or the way there refuses."""

import getpass
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from safetensors.torch import save_file
from torch import zeros
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_kdtl.evaluation.results import update_results
from hf_kdtl.hub.provenance import saved_hash
from hf_kdtl.hub.staging import refuse_secrets, stage_student
from hf_kdtl.hub.upload import HubError, check_access, publish
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.utils.redaction import anonymous, local_paths
from tests.hub.client import hub  # noqa: F401
from tests.hub.server import TOKEN, Fault, User
from tests.support.tiny import build

pytestmark = pytest.mark.usefixtures("hub")
CARD = ModelCard("---\nlicense: mit\n---\n# A student\n\n![curves](curves.png)\n")
ALLOWED = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "README.md", "curves.png"}


@pytest.fixture
def run():
    """A run folder with much beside the student that is nobody's business."""
    folder = Path("run")
    student = folder / "student"
    model = build("vit")
    model.save_pretrained(student)
    ViTImageProcessor().save_pretrained(student)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"_name_or_path": str(Path.cwd() / "teacher")}))
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json", "notes.txt"):
        (student / name).write_text(f"{TOKEN} {Path.cwd()}")
    settings = {"teacher": f"{Path.home()}/my teachers/vit", "dataset": str(Path.cwd() / "images"), "seed": 3}
    update_results(folder, "run", {"recipe": "distill", "settings": settings})
    raw = json.loads((folder / "results.json").read_text())
    raw["run"]["settings"] = settings  # as an older version wrote it
    (folder / "results.json").write_text(json.dumps(raw))
    for name in ("curves.png", "sheet.png", "secret.png"):
        (folder / name).write_bytes(b"a picture")
    return folder


def kept(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_student_alone_goes_up_and_nothing_of_this_machine(hub, run, tmp_path):  # noqa: F811
    before = kept(run)
    commit = publish(run, "student", CARD, private=True)
    files = hub.files("tester/student")
    assert set(files) == ALLOWED | {".gitattributes"}
    assert hub.repositories["tester/student"].private and hub.messages("tester/student")[-1] == "Publish the student"
    assert commit.oid == hub.repositories["tester/student"].at("main").oid
    own = [TOKEN, str(Path.home()), str(tmp_path), f"/{getpass.getuser()}/"]
    for secret in own:
        for name, content in (hub.uploaded() | {"messages": "".join(hub.messages("tester/student")).encode()}).items():
            assert secret.encode() not in content, (secret, name)
    settings = json.loads(files["results.json"])["run"]["settings"]
    assert settings == {"teacher": "vit", "dataset": "images", "seed": 3}
    assert kept(run) == before
    opened = AutoModelForImageClassification.from_pretrained("tester/student")
    assert opened.config.model_type == "vit" and opened.config.num_labels == 3
    # Again: nothing is sent twice, and a student of another kind leaves no weights behind.
    hub.log.clear()
    publish(run, "tester/student", CARD)
    assert not [line for line in hub.log if line.startswith("PUT")] and len(hub.messages("tester/student")) == 2
    for weights in (run / "student").glob("*.safetensors"):
        weights.unlink()
    save_file({"a": zeros(1)}, run / "student/model-00001-of-00001.safetensors")
    publish(run, "tester/student", CARD)
    assert {name for name in hub.files("tester/student") if name.endswith("tensors")} == {
        "model-00001-of-00001.safetensors"
    }


def test_a_branch_and_a_pull_request(hub, run):  # noqa: F811
    publish(run, "tester/student", CARD, revision="trial")
    assert set(hub.files("tester/student", "trial")) >= ALLOWED and "config.json" not in hub.files("tester/student")
    hub.add("other/model", {"results.json": b"{}"})
    proposed = publish(run, "other/model", CARD, create_pr=True, commit_message="A smaller one")
    assert proposed.pr_revision == "refs/pr/1" and set(hub.files("other/model", "refs/pr/1")) >= ALLOWED
    assert set(hub.files("other/model")) == {".gitattributes", "results.json"}


NET = "the Hub could not be reached"
BUSY = "Cannot create repo: another conflicting operation is in progress"
FAULTS = [
    (Fault("GET", "whoami", 401), "(401): the token is wrong or has expired"),
    (Fault("GET", "whoami", 429, {"Retry-After": "31"}), "(429): too many requests. Wait 31 seconds"),
    (Fault("POST", "/commit/", 403), "(403): this token may not write to tester/student"),
    (Fault("POST", "/commit/", 404), "(404): tester/student was not found, or is private"),
    (Fault("POST", "/commit/", 409), "(409): something else was going on"),
    (Fault("POST", "/commit/", 412), "(412): somebody else has committed since"),
    (Fault("POST", "/commit/", 429, {"Retry-After": "9"}), "(429): too many requests. Wait 9 seconds"),
    (Fault("POST", "/commit/", 500), "(500): the trouble is the Hub's"),
    (Fault("POST", "/commit/", cut="request"), NET),
    (Fault("POST", "/commit/", cut="response"), NET),
    (Fault("POST", "preupload", 503, times=99), "(503): the trouble is the Hub's"),
    (Fault("POST", "batch", 429, times=99), "(429): too many requests. Wait a few minutes"),
    (Fault("PUT", "/objects/", cut="request", times=99), NET),
    (Fault("PUT", "/objects/", 500, times=99), "(500): the trouble is the Hub's"),
    (
        Fault(
            "POST",
            "/api/repos/create",
            409,
            message="Cannot create repo: another conflicting operation is in progress",
        ),
        None,
    ),
    (Fault("POST", "preupload", 503, times=2), None),
    (Fault("PUT", "/objects/", cut="request"), None),
]


@pytest.mark.parametrize(("fault", "sentence"), FAULTS)
def test_a_fault_is_reported_and_the_student_stays_complete(hub, run, fault, sentence):  # noqa: F811
    hub.add("tester/student")
    before, start = kept(run), dict(hub.files("tester/student"))
    hub.fail(fault)
    if sentence is None:
        publish(run, "tester/student", CARD)
        assert fault.times == 0 and set(hub.files("tester/student")) >= ALLOWED
        return
    with pytest.raises(HubError) as caught:
        publish(run, "tester/student", CARD)
    assert sentence in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert kept(run) == before
    if fault.cut != "response":  # then the commit was made, and its answer was lost
        assert hub.files("tester/student") == start  # all or nothing
    hub.faults.clear()
    publish(run, "tester/student", CARD)
    assert set(hub.files("tester/student")) >= ALLOWED


def test_without_network(hub, run, monkeypatch):  # noqa: F811
    hub.stop()
    with pytest.raises(HubError, match=f"{NET} .*ConnectError"):
        publish(run, "tester/student", CARD)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"{NET} .*Offline.*HF_HUB_OFFLINE"):
        publish(run, "tester/student", CARD)


def test_missing_write_access_is_reported_before_any_work(hub, monkeypatch):  # noqa: F811
    hub.users |= {
        "hf_reads": User("tester", role="read"),
        "hf_member": User("member", orgs={"lab": "write", "club": "read"}),
    }
    assert check_access("mine", TOKEN) == "tester/mine" and check_access("lab/mine", "hf_member") == "lab/mine"
    hub.add("club/model")
    hub.add("tester/gated", readers=[])
    for name, token, kind, sentence in [
        ("mine", "hf_wrong", HubError, r"\(401\): the token is wrong or has expired"),
        ("mine", "hf_reads", ValueError, "the token of tester may only read"),
        ("lab/mine", TOKEN, HubError, r"\(403\): this token may not write to lab/mine"),
        ("club/model", "hf_member", HubError, r"\(403\): this token may not write to club/model.*--create_pr true"),
        ("tester/gated", "hf_member", HubError, r"\(403\)"),
        ("no name//", TOKEN, ValueError, "Repo id"),
    ]:
        with pytest.raises(kind, match=sentence):
            check_access(name, token)
    assert check_access("club/model", "hf_member", create_pr=True) == "club/model"
    with pytest.raises(HubError, match=r"\(404\): lab/none was not found"):
        check_access("lab/none", "hf_member", create_pr=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"there is no token for the Hub.*hf auth login"):
        check_access("mine")


def test_a_repository_with_something_else_is_left_alone(hub, run):  # noqa: F811
    hub.add("tester/bert", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(ValueError, match=r"tester/bert exists and holds config\.json, pytorch_model\.bin, and no"):
        publish(run, "tester/bert", CARD)
    assert set(hub.files("tester/bert")) == {".gitattributes", "config.json", "pytorch_model.bin"}
    # results.json is a name that others use too, and another branch may hold another model.
    for content in (b'{"lm-eval": 1}', b"[]", b"{", b'{"schema": 1, "run": {"recipe": "evaluate_student"}}'):
        hub.add("tester/other", {"results.json": content, "model.safetensors": b"precious"})
        with pytest.raises(ValueError, match="tester/other exists and holds"):
            publish(run, "tester/other", CARD)
    hub.add("tester/branches").commit("v1", "m", {"model.safetensors": b"precious"})
    with pytest.raises(ValueError, match=r"tester/branches \(branch v1\) exists and holds model\.safetensors"):
        publish(run, "tester/branches", CARD, revision="v1")
    assert hub.files("tester/branches", "v1") == {"model.safetensors": b"precious"}
    publish(run, "tester/branches", CARD)
    hub.add("tester/new", {"README.md": b"---\n---\n", "LICENSE": b"MIT"})
    assert check_access("tester/new") == "tester/new"
    with pytest.raises(ValueError, match="tester/new exists and is public, and a private one is requested"):
        check_access("tester/new", private=True)


def test_paths_are_cut_to_their_last_part(monkeypatch):
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/users/ann")))
    for given, shown in {
        "/mnt/disk of ann/cats": "cats",
        "C:\\Users\\ann\\cats": "cats",
        "users/ann/my cats": "my cats",  # results.json cuts the working folder off
        "read from /data/ann/cats and ~/ann/dogs": "read from cats and dogs",
        "google/vit-base is 1/2 of it": "google/vit-base is 1/2 of it",
        "read from runs/cats/train and data/cats.": "read from runs/cats/train and data/cats.",  # no known folder
        "train/validation/test": "train/validation/test",
        "1/2/3 of them, https://host.org/a/b/c": "1/2/3 of them, https://host.org/a/b/c",
    }.items():
        assert anonymous([{"x": given}]) == [{"x": shown}]
    settings = {"a": ["runs/teacher/model", "owner/name"], "b": {"c": "runs\\a", "d": "x"}}
    assert (local := local_paths(settings)) == {"runs/teacher/model", "runs\\a"}
    given = ["'runs/teacher/model'", "runs\\a.", "my/runs/teacher/model", "runs/teacher/models"]
    assert anonymous(given, local) == ["'teacher'", "a.", "my/runs/teacher/model", "runs/teacher/models"]
    names = {"data": {"classes": ["/m/01yrx", "~/cow", "C:\\cat"]}}
    assert anonymous(names) == names


def test_a_home_that_is_not_ascii_is_found_as_json_writes_it(monkeypatch):
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/home/jürgen")))
    for text in ("/home/jürgen/x", json.dumps("/home/jürgen/x"), "file:///home/j%C3%BCrgen/x"):
        with pytest.raises(ValueError, match="names /home/jürgen, a folder of this machine"):
            refuse_secrets("config.json", text.encode())
    refuse_secrets("config.json", b"/home/jurgen/x")


def test_of_two_students_in_a_folder_the_one_of_the_results_goes_up(run, tmp_path):
    student = run / "student"
    save_file({"a": zeros(1)}, student / "adapter_model.safetensors")
    (student / "adapter_config.json").write_text('{"base_model_name_or_path": "google/vit"}')
    full, adapter = {"config.json", "model.safetensors"}, {"adapter_config.json", "adapter_model.safetensors"}
    cases = {
        "": ({}, full),
        "full": ({"adapters": None}, full),
        "lora": ({"adapters": {"default": "LORA"}}, adapter),
    }
    for name, (about, mine) in cases.items():
        (tmp_path / f"to{name}").mkdir()
        found = {"models": {"student": about}, "curves": {"run": [{"loss": float("nan")}]}}
        names = {path.name for path in stage_student(student, tmp_path / f"to{name}", CARD, found).iterdir()}
        assert names & (full | adapter) == mine
        assert json.loads((tmp_path / f"to{name}/results.json").read_text())["curves"] == {"run": [{"loss": None}]}
    expected = fingerprint(AutoModelForImageClassification.from_pretrained(tmp_path / "tofull"))
    assert saved_hash(student, adapter=False) == expected  # the adapter beside it is not loaded


@pytest.mark.parametrize("where", ["README.md", "config.json", "model.safetensors", "commit message"])
@pytest.mark.parametrize("secret", ["token", "pattern", "folder"])
def test_a_secret_stops_the_push(hub, run, where, secret):  # noqa: F811
    text = {"token": TOKEN, "pattern": f"hf_{'a' * 34}", "folder": f"{Path.home()}/x"}[secret]
    card, message = CARD, "m"
    if where == "README.md":
        card = ModelCard(f"{CARD}\n{text}\n")
    elif where == "config.json":
        config = json.loads((run / "student/config.json").read_text())
        (run / "student/config.json").write_text(json.dumps(config | {"remark": text}))
    elif where == "model.safetensors":
        save_file({"a": zeros(1)}, run / "student/model.safetensors", metadata={"by": text})
    else:
        message = f"{text} is pushed"
    with pytest.raises(ValueError, match=f"{where} .*nothing was published") as caught:
        publish(run, "tester/student", card, commit_message=message)
    assert TOKEN not in str(caught.value)
    assert not hub.objects and all(set(hub.files(name)) == {".gitattributes"} for name in hub.repositories)


def test_what_is_no_student_or_cannot_be_opened_elsewhere(hub, run):  # noqa: F811
    student = run / "student"
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"run/student holds .*.*model.safetensors \(a .bin .*pickle"):
        publish(run, "tester/student", CARD)
    save_file({"a": zeros(1)}, student / "adapter_model.safetensors")
    adapter = {"base_model_name_or_path": str(Path.cwd()), "peft_type": "LORA"}
    (student / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"an adapter on '.*', a folder of this machine.*merge_and_unload\(\)"):
        publish(run, "tester/student", CARD)
    (student / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="an adapter on a model without a name"):
        publish(run, "tester/student", CARD)
    (student / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "google/vit"}))
    publish(run, "tester/student", CARD)
    assert {"adapter_config.json", "adapter_model.safetensors"} < set(hub.files("tester/student"))
