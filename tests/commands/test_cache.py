"""hf-kdtl cache: what is written and how it is grown; a run from it is that of the live teacher."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_kdtl import DistillationConfig
from hf_kdtl.commands import push
from hf_kdtl.commands.common import store_worth, timing
from hf_kdtl.commands.common.next_command import program
from hf_kdtl.commands.common.store_worth import Worth
from hf_kdtl.evaluation.results import read_results
from hf_kdtl.hub.model_card import student_card
from hf_kdtl.models.teachers import StoredTeacher
from hf_kdtl.models.teachers.store.manifest import FILE
from tests.commands.conftest import CONFIG, QUICK

STUDENT = ["--dataset", "images", "--student_config", json.dumps(CONFIG), "--teacher", "teacher"]
STUDENT += ["--augmentation", '{"crop": 2, "flip": true}']
OBJECTIVES = ["--objectives", '[{"name": "task"}, {"name": "logit_kd"}, {"name": "attention_map", "layers": "last"}]']
BATCH = ["--teacher_batch", "8", "--use_cpu", "true"]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_a_run_from_a_store_is_the_run_of_its_teacher(command, images, teacher, capsys):
    command("cache").main([*STUDENT, *OBJECTIVES, *BATCH, "--views", "2", "--output", "store"])
    printed = capsys.readouterr().out
    assert "26 images x 2 views" in printed and "To write: 0.00 GB" in printed and "--teacher store" in printed
    run = [*STUDENT, *OBJECTIVES, *QUICK, "--max_steps", "4", "--output_dir"]
    command("distill").main([*run, "live", "--teacher_batch", "8", "--views", "2"])
    command("distill").main([*run, "stored", "--teacher", "store"])
    live, stored = (load_file(f"{name}/student/model.safetensors") for name in ("live", "stored"))
    assert all(live[name].equal(stored[name]) for name in live)


def test_a_store_is_grown_by_what_is_new(command, images, teacher, capsys):
    main = command("cache").main
    main([*STUDENT, *BATCH, "--views", "1", "--output", "store"])
    before = tree("store")
    main(["--output", "store", "--views", "2", *OBJECTIVES])
    after = tree("store")
    small = {name: content for name, content in before.items() if name != FILE}
    assert small.items() <= after.items()
    assert set(StoredTeacher("store").manifest.kinds) == {"logits", "attention_rows-2"}
    Path("mine.yaml").write_text("seeds: [1, 2]\n")  # a file of distill's settings serves
    main(["--config", "mine.yaml", *STUDENT, *OBJECTIVES, *BATCH, "--views", "2", "--output", "at_once"])
    assert after == tree("at_once")
    capsys.readouterr()
    main(["--info", "store"])
    printed = capsys.readouterr().out
    assert "26 images x 2 views" in printed and "4 of 4 shards" in printed and "attention_rows-2" in printed


def test_what_cannot_be_stored_or_is_not_is_refused_with_what_to_type(command, images, teacher):
    main = command("cache").main
    for entry, reason in (
        ({"name": "noisy_kd"}, "objective 'noisy_kd': it cannot be stored, because the teacher runs at pixels"),
        ({"name": "relation"}, "objective 'relation': it cannot be stored, because queries, keys and values"),
        ({"name": "jacobian"}, "objective 'jacobian': it cannot be stored.*\"sketch\": 64"),
    ):
        with pytest.raises(ValueError, match=reason):
            main([*STUDENT, *BATCH, "--objectives", json.dumps([{"name": "task"}, entry]), "--output", "store"])
    with pytest.raises(ValueError, match=r"expected the folder of the store, such as --output"):
        main(STUDENT)
    with pytest.raises(ValueError, match=r"take 0.00 GB more and --max_gb is 1e-09.*--precision float16"):
        main([*STUDENT, *BATCH, "--output", "store", "--max_gb", "1e-9"])
    assert not Path("store", FILE).exists()
    main([*STUDENT, *BATCH, "--views", "1", "--output", "store"])
    with pytest.raises(ValueError, match=r"objective 'attention_map': attention_rows-2 of the teacher is not stored"):
        command("distill").main([*STUDENT, *OBJECTIVES, *QUICK, "--teacher", "store", "--output_dir", "out"])
    with pytest.raises(
        ValueError, match=r"data\.augmentation\.crop is '2 of 16x16 pixels' in the store and not set here"
    ):
        other = [*STUDENT, "--augmentation", '{"flip": true}', *QUICK, "--output_dir", "out"]
        command("distill").main([*other, "--teacher", "store"])


def test_without_a_student_what_pairs_no_layers_is_stored(command, images, teacher, capsys):
    main = command("cache").main
    plain = ["--dataset", "images", "--teacher", "teacher", *BATCH, "--views", "1", "--output", "store"]
    with pytest.raises(ValueError, match=r"found no student.*--image_size <pixels>"):
        main(plain)
    main([*plain, "--image_size", "16"])
    assert set(StoredTeacher("store").manifest.kinds) == {"logits"}
    shutil.rmtree("store")
    main([*plain, "--teacher_pixels", "own"])
    main(["--info", "store"])
    assert "the teacher's own pixels" in capsys.readouterr().out
    run = [*STUDENT[:4], *QUICK, "--views", "1", "--augmentation", "{}", "--output_dir"]
    command("distill").main([*run, "stored", "--teacher", "store"])
    command("distill").main([*run, "live", "--teacher", "teacher", "--teacher_pixels", "own", "--teacher_batch", "8"])
    stored, live = (load_file(f"{name}/student/model.safetensors") for name in ("stored", "live"))
    assert all(live[name].equal(stored[name]) for name in live)
    command("distill").main([*run, "auto", "--teacher", "teacher", "--teacher_pixels", "own", "--cache", "auto"])
    shutil.rmtree("store")
    with pytest.raises(ValueError, match="objective 'hidden_states' pairs layers of a student"):
        main([*plain, "--image_size", "16", "--objectives", "task", "hidden_states"])


def test_what_a_store_saves_is_said_with_the_commands_to_type(command, images, teacher, capsys, monkeypatch):
    found = Worth(share=0.61, views=20, gb=3.21, passes=100, back=24.4)
    assert found.saved == pytest.approx(0.61 * 0.8)
    text = found.sentence(["--teacher", "my teacher", "--output_dir", "out"])
    said = "The teacher's forward is 61% of the step; 20 views cost 3.21 GB and, stored in the first 20 of 100 passes,"
    typed = "--teacher 'my teacher' --output_dir out --views 20"
    assert text.startswith(f"{said} save 49% of the time: type\n  {program()} distill {typed} --cache auto\n")
    assert f"they pay back after 24 passes: type\n  {program()} cache {typed} --output cache/" in text
    assert "in 15 passes no view recurs" in replace(found, passes=15).sentence([])
    assert found.worth_saying
    assert not any(replace(found, **kw).worth_saying for kw in ({"gb": 270.0}, {"passes": 0.3}, {"share": 0.05}))
    monkeypatch.setattr(store_worth, "WORTH_SAYING", 0)
    modes, timed = set(), store_worth.timed
    monkeypatch.setattr(store_worth, "timed", lambda d, x: modes.add(d.student.training) or timed(d, x))
    flags = [*STUDENT, *OBJECTIVES, *QUICK, "--views", "2", "--output_dir", "out"]
    command("preflight").main([*flags, "--max_steps", "70"])
    printed = capsys.readouterr().out
    assert "% of the step; 2 views cost" in printed
    assert modes == {True}  # LeViT keeps a graph of what it computes in eval mode
    assert shlex.join([*flags, "--max_steps", "70", "--cache", "auto"]) in printed
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  ") and " cache " in line]
    words = shlex.split(lines[-1])
    command("cache").main(words[words.index("cache") + 1 :])
    size = StoredTeacher("cache").manifest.bytes / 1e9
    assert f"2 views cost {size:.3g} GB" in printed
    monkeypatch.setattr(timing, "WORTH_MEASURING", 3)
    command("distill").main([*flags, "--max_steps", "12", "--teacher_batch", "8"])
    assert "The teacher's forward is" in capsys.readouterr().out
    command("distill").main([*flags[:-1], "no_store", "--max_steps", "2"])
    assert "The teacher's forward is" not in capsys.readouterr().out


def test_the_command_that_is_printed_trains(command, images, teacher, capsys):
    command("cache").main([*STUDENT, *BATCH, "--views", "1", "--output", "my store", *OBJECTIVES])
    command("cache").main(
        ["--dataset", "images", "--teacher", "teacher", "--image_size", "16", *BATCH, "--output", "b"]
    )
    for printed in capsys.readouterr().out.split("Train from it:\n")[1:]:
        words = shlex.split(printed.split("\n")[0])
        assert "..." not in words and "--dataset images" in printed
        command("distill").main([*words[words.index("distill") + 1 :], *QUICK, "--overwrite_output_dir", "true"])


def test_the_teachers_license_is_kept_in_the_store_and_used_in_the_students_card(command, images, teacher):
    Path("teacher/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    command("cache").main([*STUDENT, *BATCH, "--views", "1", "--output", "store"])
    shutil.rmtree("teacher")
    run = [*STUDENT, *QUICK, "--teacher", "store", "--output_dir"]
    command("distill").main([*run, "out"])
    assert read_results("out")["models"]["teacher"]["licence"] == "cc-by-nc-4.0"
    card = student_card(read_results("out"))
    assert card.data.license == "cc-by-nc-4.0" and "as of its teacher" in card.text
    with pytest.raises(ValueError, match=r"the teacher's license is cc-by-nc-4\.0 and mit is requested"):
        push.planned(DistillationConfig("out", push_to_hub=True, license="mit"), ["store"], None)


def test_a_store_is_written_while_a_run_trains_and_read_by_the_next(command, images, teacher, capsys):
    quick = [*STUDENT, *OBJECTIVES, *QUICK, "--teacher_batch", "8", "--views", "2"]
    passes = ["--max_steps", "28"]  # 7 batches a pass: 4 passes over 2 views
    command("cache").main([*STUDENT, *OBJECTIVES, *BATCH, "--views", "2", "--output", "store"])
    command("distill").main([*quick, *passes, "--teacher", "store", "--output_dir", "before"])
    Path("mine.yaml").write_text("cache: auto\nseeds: [42, 43]\n")
    capsys.readouterr()
    command("distill").main(["--config", "mine.yaml", *quick, *passes, "--output_dir", "auto"])
    printed = capsys.readouterr().out
    assert "2 runs of 4.0 passes, of which the teacher runs in about 25 %" in printed
    before, after = (load_file(f"{name}/distilled-seed42/model/model.safetensors") for name in ("before", "auto"))
    assert all(before[name].equal(after[name]) for name in before)
    written, kept = tree("store"), tree("auto/cache")
    assert written.keys() == kept.keys()
    assert {name for name in kept if kept[name] != written[name]} <= {FILE}  # the settings of the command
    assert "auto/cache" not in Path("auto/results.json").read_text()
    command("distill").main([*quick, "--teacher", "auto/cache", "--output_dir", "next"])
    capsys.readouterr()
    command("cache").main(["--output", "auto/cache", "--use_cpu", "true"])
    assert "To write: 0.00 GB" in capsys.readouterr().out
    main = command("distill").main
    with pytest.raises(ValueError, match=r"stores what one live model gives, and found teacher 'store'"):
        main([*quick, "--teacher", "store", "--cache", "auto", "--output_dir", "out"])
    cut = ["--teacher", "teacher", "--dataset", "images", "--student_layers", "1"]
    with pytest.raises(ValueError, match=r"--cache is not for --stages"):
        main([*cut, "--stages", "2", "--cache", "auto", "--output_dir", "out"])
    with pytest.raises(ValueError, match=r"objective 'noisy_kd': it cannot be stored"):
        main([*STUDENT, "--objectives", "task", "noisy_kd", *QUICK, "--cache", "auto", "--output_dir", "out"])
