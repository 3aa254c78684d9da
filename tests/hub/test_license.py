"""Under which license a student may go out."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_kdtl.evaluation.model_records import Models
from hf_kdtl.hub import license as licenses
from hf_kdtl.hub.license import license_of, most_restrictive, of_parents, resolve_license, student_license


@pytest.mark.parametrize(
    "its, asked, found",
    [
        (None, "MIT", "mit"),
        ("other", "apache-2.0", "apache-2.0"),
        ("apache-2.0", None, "apache-2.0"),
        ("mit", "cc-by-nc-4.0", "cc-by-nc-4.0"),  # stricter is allowed
        ("cc-by-nc-4.0", None, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("gpl-3.0", "gpl-3.0", "gpl-3.0"),
    ],
)
def test_what_is_compatible_is_taken(its, asked, found):
    assert resolve_license(its, asked) == found


@pytest.mark.parametrize(
    "its, asked, message",
    [
        (None, None, "--license <identifier>"),
        ("unknown", "", "expected an identifier"),
        ("cc-by-nc-4.0", "apache-2.0", "is cc-by-nc-4.0 and apache-2.0 is requested.*non-commercial"),
        ("cc-by-nc-4.0", "cc-by-4.0", "would loosen it"),
        ("cc-by-nc-4.0", "cc-by-nc-nd-4.0", "would loosen|requested"),
        ("cc-by-sa-4.0", "cc-by-4.0", "share-alike"),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0", "is requested"),
        ("gpl-3.0", "mit", "not on our list"),
        ("llama3", "apache-2.0", "llama3 and apache-2.0"),
        ("cc-by-nd-4.0", None, "no derivatives"),
        ("cc-by-nc-nd-4.0", "cc-by-nc-nd-4.0", "no derivatives"),
        ("mit", "my license\nline", "expected an identifier"),
    ],
)
def test_what_is_not_is_refused(its, asked, message):
    with pytest.raises(ValueError, match=message):
        resolve_license(its, asked)


def test_of_several_parents_the_strictest_binds():
    assert most_restrictive(["mit", "apache-2.0"]) == "mit"
    assert most_restrictive(["mit", "cc-by-nc-4.0", "cc-by-nc-4.0"]) == "cc-by-nc-4.0"
    assert most_restrictive(["mit", None]) is None and most_restrictive([]) is None
    with pytest.raises(ValueError, match=r"gpl-3.0 and cc-by-nc-4.0, which cannot all be kept"):
        most_restrictive(["gpl-3.0", "cc-by-nc-4.0"])


def test_a_parent_without_a_known_license_makes_it_unknown():
    start, nameless = {"how": "pretrained", "licence": "mit"}, {"name": None, "licence": None}
    assert of_parents(Models.of({"student": {"start": start}})) == "mit" and of_parents(Models.of({})) is None
    assert of_parents(Models.of({"teacher": nameless, "student": {"start": start}})) is None
    assert of_parents(Models.of({"teacher": {}, "student": {"start": start}})) is None  # its nulls were left out
    assert of_parents(Models.of({"teacher": {"licence": "gpl-3.0"}, "student": {"start": start}})) == "gpl-3.0"
    assert of_parents(Models.of({"teacher": {"licence": "mit"}, "student": {"start": {"how": "random"}}})) == "mit"
    for asked in (None, ""):
        with pytest.raises(ValueError, match=r"--license apache-2\.0.* in Python DistillationConfig\(license="):
            resolve_license(None, asked)


@pytest.mark.parametrize(
    "text, found",
    [
        ("---\nlicense: Apache-2.0\n---\n# A teacher\n", "apache-2.0"),
        ("---\nlicense: [mit]\n---\n", "mit"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", None),
        ("---\nlicense: other\n---\n", None),
        ("---\ntags: [x]\n---\n", None),
        ("# no metadata\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\nlicense: 'do what\n\n  you like'\n---\n", None),
        ("---\n- a list\n---\n", None),
    ],
)
def test_a_folders_card_is_read(text, found):
    Path("teacher").mkdir()
    Path("teacher/README.md").write_text(text)
    assert license_of("teacher") == found


def test_no_card_and_no_network_are_not_known(monkeypatch):
    Path("bare").mkdir()
    assert license_of("bare") is None
    assert license_of("owner/name") is None  # offline
    for error in (LocalEntryNotFoundError("no network"), TimeoutError("slow"), ConnectionResetError("cut")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(licenses.ModelCard, "load", fail)
        assert license_of("owner/name", token="x") is None


TEACHER, START = {"name": "t", "licence": None}, {"start": {"how": "pretrained", "licence": None}}


@pytest.mark.parametrize(
    "models, message",
    [
        ({}, "no license was chosen. The student has no teacher"),
        ({"student": {"start": {"how": "random"}}}, "no license was chosen"),
        ({"teacher": TEACHER}, "^the teacher's license is not known"),
        ({"student": START}, "^the license of the model that the student starts from is not known"),
        ({"teacher": TEACHER, "student": START}, "^the teacher's license, or that of the model"),
    ],
)
def test_the_error_names_what_binds_the_student(models, message):
    with pytest.raises(ValueError, match=message):
        student_license(Models.of(models), None)
    assert student_license(Models.of(models), "mit") == "mit"
