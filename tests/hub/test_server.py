"""The loopback Hub does what the real client expects of the Hub: then what is tested against it means something."""

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, errors

from tests.hub.client import hub  # noqa: F401
from tests.hub.server import Fault, User

CARD = "---\nlicense: mit\n---\n# A student\n"


def add(path, content=b"{}"):
    return CommitOperationAdd(path, content)


def test_a_repository_from_its_making_to_a_clone(hub, tmp_path):  # noqa: F811
    api = HfApi()
    assert api.whoami()["name"] == "tester"
    for _ in range(2):
        assert api.create_repo("student", exist_ok=True).repo_id == "tester/student"
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.create_repo("tester/student")
    assert caught.value.response.status_code == 409
    api.auth_check("tester/student", write=True)
    weights = bytes(range(256)) * 5000
    files = [add("config.json"), add("model.safetensors", weights), add("README.md", CARD.encode())]
    made = api.create_commit("tester/student", files, commit_message="first")
    assert made.oid == hub.repositories["tester/student"].at("main").oid
    assert hub.messages("tester/student") == ["initial commit", "first"]
    huggingface_hub.snapshot_download("tester/student", local_dir=tmp_path / "clone")
    assert (tmp_path / "clone/model.safetensors").read_bytes() == weights
    assert ModelCard.load("tester/student").data.license == "mit"
    assert huggingface_hub.file_exists("tester/student", "none.json") is False
    # The same again is no commit; a branch; a pull request; a parent that has moved on.
    api.create_commit("tester/student", files := [add("config.json")], commit_message="again")
    assert hub.messages("tester/student") == ["initial commit", "first"] and files
    api.create_branch("tester/student", branch="trial")
    api.create_commit("tester/student", [add("a.json", b"1")], commit_message="on trial", revision="trial")
    assert "a.json" in api.list_repo_files("tester/student", revision="trial")
    assert "a.json" not in api.list_repo_files("tester/student")
    proposed = api.create_commit("tester/student", [add("b.json", b"2")], commit_message="proposed", create_pr=True)
    assert proposed.pr_revision == "refs/pr/1" and "b.json" in hub.files("tester/student", "refs/pr/1")
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since"):
        api.create_commit("tester/student", [add("c.json", b"3")], commit_message="late", parent_commit="0" * 40)


def test_an_upload_that_broke_off_is_resumed(hub):  # noqa: F811
    api = HfApi()
    hub.add("tester/student")
    hub.fail(Fault("POST", "/commit/main", status=503))
    weights = b"weights" * 1000
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        api.create_commit("tester/student", [add("model.safetensors", weights)], commit_message="m")
    assert len(hub.objects) == 1 and "model.safetensors" not in hub.files("tester/student")
    hub.log.clear()
    api.create_commit("tester/student", [add("model.safetensors", weights)], commit_message="m")
    assert hub.files("tester/student")["model.safetensors"] == weights
    assert not [line for line in hub.log if line.startswith("PUT")]  # it was there


def test_faults_that_the_client_itself_tries_again(hub):  # noqa: F811
    hub.add("tester/student")
    faults = [
        Fault("PUT", "/objects/", cut="request"),
        Fault("PUT", "/objects/", status=500),
        Fault("POST", "batch", cut="response"),
        Fault("POST", "preupload", status=429, headers={"Retry-After": "7"}),
        Fault("POST", "preupload", status=503),
        Fault("POST", "verify", status=504),
    ]
    hub.fail(*faults)
    HfApi().create_commit("tester/student", [add("model.safetensors", b"w" * 99)], commit_message="m")
    assert [fault.times for fault in faults] == [0] * 6
    assert hub.files("tester/student")["model.safetensors"] == b"w" * 99


def test_private_gated_foreign_and_read_only(hub):  # noqa: F811
    hub.users |= {"hf_other": User("other"), "hf_reader": User("tester", role="read")}
    hub.add("tester/hidden", {"config.json": b"{}"}, private=True)
    hub.add("tester/gated", {"config.json": b"{}", "other.json": b"{}"}, readers=["tester"])
    ours, others = HfApi(), HfApi(token="hf_other")
    ours.hf_hub_download("tester/hidden", "config.json")
    ours.hf_hub_download("tester/gated", "config.json")
    with pytest.raises(errors.RepositoryNotFoundError, match="404"):
        others.model_info("tester/hidden")
    with pytest.raises(errors.RepositoryNotFoundError, match="401"):
        HfApi(token=False).model_info("tester/hidden")
    with pytest.raises(errors.GatedRepoError, match="403"):
        others.hf_hub_download("tester/gated", "other.json")
    for foreign in (others, HfApi(token="hf_reader")):
        with pytest.raises(errors.HfHubHTTPError, match="403"):
            foreign.auth_check("tester/gated", write=True)
        with pytest.raises(errors.HfHubHTTPError, match="403"):
            foreign.create_commit("tester/gated", [add("x.json")], commit_message="m")
    with pytest.raises(errors.HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(ValueError, match="metadata"):
        ours.create_commit("tester/gated", [add("README.md", b"no metadata at all")], commit_message="m")
