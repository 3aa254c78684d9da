"""The card of a student: what it says, that its figures are those of results.json, and that no name can break it."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification

from hf_kdtl import DistillationTrainer
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import SCHEMA, update_results
from hf_kdtl.evaluation.statistics import paired_difference
from hf_kdtl.hub.card_results import published
from hf_kdtl.hub.card_tables import _interval
from hf_kdtl.hub.markdown import Markdown, fenced, inline, table
from hf_kdtl.hub.model_card import results_of, student_card, with_evaluation
from hf_kdtl.hub.provenance import made_from, model_facts, origin, saved_hash, student_hash
from hf_kdtl.reports.run_report import markdown
from hf_kdtl.utils.redaction import without_paths
from tests.reports.test_evaluation_summary import evaluation
from tests.support.helpers import Images, config, pair, trainer
from tests.support.tiny import build

NASTY = ["a|b", "<script>x</script>", "cat\n---\nlicense: mit", "`code` ```", "../../etc/passwd", "[x](http://e.org)",
         "word\n\n# heading", "# no heading", "1. one", "- item", "{{ 7 * 7 }} {%", "---", "\u202eevil",
         "&lt;b&gt; $x$ *y*"]  # fmt: skip
SCORES = {"accuracy": 0.6, "nll": 0.9, "ece": 0.05, "agreement": 0.7}


def run(test, **more):
    return {"validation": {"accuracy": 0.61}, "test": SCORES | {"accuracy": test} | more}


def comparison(distilled, alone):
    found = paired_difference(distilled, alone)
    low, high = found["interval"] or (None, None)
    entry = {"a": "distilled", "b": "alone", "metric": "accuracy", "split": "test", "mean": found["mean"]}
    return [entry | {"low": low, "high": high, "seeds": list(range(1, 1 + len(alone)))}]


def results(names=("cat", "dog", "emu"), alone=(0.57, 0.55)):
    speed = {"parameters": 1_000_000, "images_per_second": 250.0}
    arms = {"alone": alone, "distilled": (0.6, 0.62)}
    models = {arm: speed | {"runs": {str(seed + 1): run(value) for seed, value in enumerate(values)}}
              for arm, values in arms.items()}  # fmt: skip
    models |= {"teacher": speed | {"parameters": 2_000_000, "runs": {"teacher": run(0.8)}}}
    return {
        "schema": SCHEMA,
        "run": {
            "recipe": "distill",
            "settings": {"teacher": "/home/me/secret/vit-big", "learning_rate": 0.001, "seeds": [1, 2]},
            "processes": 1,
            "device": "a CPU",
            "versions": {"hf_kdtl": "0.1.0"},
        },
        "data": {"source": "owner/pets", "hub": True, "sizes": {"train": 90, "validation": 30, "test": 60},
                 "classes": list(names), "splits": {"split_seed": 42}, "notes": ["read from /home/me/pets today."]},
        "objectives": [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0},
                       {"name": "dist", "weight": 0.0}],
        "models": {
            "teacher": {"name": "owner/vit-big", "hub": True, "revision": "abc123", "licence": "apache-2.0",
                        "architecture": "ViTForImageClassification", "parameters": 2_000_000, "fingerprint": "t1"},
            "student": {"architecture": "ViTForImageClassification", "parameters": 1_000_000, "image_size": [32, 32],
                        "adapters": None, "fingerprint": "s1", "start": {"how": "cut", "layers": 4, "name": None}},
            "pairing": {"attention_map": "student  teacher\n      0        1"},
        },
        "pairing": {"notes": ["labels match by name."]},
        "evaluation": {
            "models": models,
            "batch_size": 8,
        },
        "comparison": comparison((0.6, 0.62), alone),
    }  # fmt: skip


def evaluated(names=("cat", "dog", "emu"), **changed):
    value = evaluation(names=list(names))
    for name, model in value["models"].items():
        model |= {"fingerprint": f"{name[0]}1", "path": f"/home/me/{name}", "device": "a CPU", "dtype": "float32"}
    found = {"schema": SCHEMA, "run": {"recipe": "evaluate_student", "device": "a CPU"}, "evaluation": value}
    return found | {"data": copy.deepcopy(results(names)["data"])} | changed


def body(card):
    """The rendered structure: [(kind of element, its text)], the code blocks and texts taken together."""
    return [(token.type, token.content) for token in MarkdownIt("commonmark").enable("table").parse(card.text)]


# ---- What it says ----


def test_the_first_screen_answers_the_four_questions():
    message = student_card(with_evaluation(results(), evaluated())).text.split("## How to use")[0]
    assert "image classifier for 3 classes (cat, dog, emu)" in message and "distilled from owner/vit-big" in message
    assert "**Accuracy:** **60.0 %** on 60 test images (95% interval 46.7 to 71.7 %" in message
    assert "Over 2 seeds 61.0 ± 1.4 % (mean ± standard deviation); this is the student of seed 1." in message
    assert "-20.0 points (the teacher's accuracy is 80.0 %; 95% interval of the difference" in message
    assert "It agrees with the teacher on 70.0 % of the images." in message
    assert "its worst class is dog (accuracy 30.0 %)" in message and "10.0 % under jpeg at severity 5" in message
    assert "also for images of none of them" in message
    assert "**License:** apache-2.0, as of its teacher." in message


@pytest.mark.parametrize(
    "alone, points, verdict",
    [
        ((0.5, 0.53), "+9.5 points", "better)."),
        ((0.7, 0.73), "-10.5 points", "worse)."),
        ((0.5, 0.7), "+1.0 points", "no difference shown: the interval contains 0)."),
        ((0.57, 0.59), "+3.0 points", "so another seed may reverse it."),  # the same difference twice: no interval
    ],
)
def test_the_effect_of_the_teacher_is_claimed_only_where_the_interval_excludes_0(alone, points, verdict):
    text = student_card(results(alone=alone)).text
    line = next(line for line in text.splitlines() if "**Effect of the teacher:**" in line)
    assert f"{points} of accuracy against" in line and line.endswith(verdict)


def test_one_seed_is_reported_as_one():
    found = results()
    for arm in ("alone", "distilled"):
        del found["evaluation"]["models"][arm]["runs"]["2"]
    found["comparison"] = comparison([0.6], [0.57])
    text = student_card(found).text
    assert "+3.0 points of accuracy against the same student trained without it; one seed: no interval" in text
    assert "One training run" in text and "Over 2 seeds" not in text


def test_the_student_of_the_best_seed_is_published_with_its_own_test_accuracy():
    found = results()
    found["evaluation"]["student_seed"] = 2
    card = student_card(found)
    assert "**62.0 %** on 60 test images" in card.text
    assert "this is the student of seed 2, the best on validation." in card.text
    assert {one.metric_type: one.metric_value for one in card.data.eval_results}["accuracy"] == 0.62


def test_how_it_was_made_and_how_to_use_it():
    found = results()
    found["run"]["settings"] |= {"resume_from_checkpoint": "true", "hub_model_id": "me/small"}
    text = student_card(found, model_id="me/small").text
    assert "owner/vit-big (revision abc123), ViTForImageClassification, 2,000,000 parameters" in text
    assert "Initialized from 4 of the blocks of owner/vit-big." in text
    found["models"]["student"]["start"]["kept"] = (
        "96 of 192 channels, 53% of the FLOPs"  # all blocks, at half the width
    )
    narrow = student_card(found, model_id="me/small").text
    assert "Initialized from what was kept of owner/vit-big: 96 of 192 channels, 53% of the FLOPs." in narrow
    assert "90 train, 30 validation, 60 test" in text
    assert "| logit_kd |    0.9 | temperature 4.0 |" in text and "one rate for all layers" in text
    assert "```\nstudent  teacher\n      0        1\n```" in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'model="me/small"' in code and len([line for line in code.splitlines() if line]) == 4
    again = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert again["objectives"] == results()["objectives"] and again["learning_rate"] == 0.001
    assert not {"resume_from_checkpoint", "hub_model_id"} & set(again)


def test_rates_and_rule_are_reported_and_cited_where_they_were_used():
    plain = student_card(results()).text
    assert "hinton2015distilling" in plain and "huang2022knowledge" not in plain  # dist has weight 0
    assert "kokane2024improving" not in plain and "wan2019towards" not in plain
    found = results()
    rates = {"mode": "discrepancy", "source": "attention"}
    found["run"]["settings"] |= {"layer_rates": rates, "gradient_rule": {"name": "never_hurt"}}
    history = [{"step": 0, "multipliers": [0.5, 1.5], "discrepancies": [0.1, 0.2]}]
    found["layer_rates"] = {"distilled-seed1": {"options": rates, "history": history}}
    met = [{"step": 1, "removed": 0.25, "task_step": -1.0}, {"step": 2, "removed": None, "task_step": 1.0}]
    found["gradient_rule"] = {"distilled-seed1": {"options": {"name": "never_hurt"}, "history": met}}
    text = student_card(found).text
    assert "kokane2024improving" in text and "wan2019towards" in text
    assert "from the first block to the last: 0.50, 1.50." in text
    assert "25% on average" in text and "of the 2 steps that were measured 1 went against" in text
    found["run"]["settings"]["layer_rates"] = {"mode": "llrd"}
    assert "clark2020electra" in student_card(found).text


def test_evaluation_adds_fidelity_calibration_degradation_and_cost():
    alone = student_card(results()).text
    for what in ("Similarity to the teacher inside", "Degraded images", "Cost"):
        assert f"- **{what}:** not measured." in alone
    assert "**Calibration:** expected calibration error 5.0 %." in alone
    text = student_card(with_evaluation(results(), evaluated())).text
    assert "predicted class: mean 0.25" in text
    assert "mean confidence 78.7 %, accuracy 60.0 %: over-confident" in text
    assert "1.5 GFLOP and 30.0 ms for one image" in text and "a file of 8.0 MB" in text
    assert "`jpeg`" in text and "Compared with the other models" in text
    assert "Degradations that were not evaluated: gaussian_noise" in text
    assert "another model, which this student would replace" in text


def test_the_baseline_is_the_student_alone_where_its_scores_are():
    found = results()
    found["evaluation"]["models"]["alone"]["runs"]["2"]["test"]["nll"] = evaluation()["models"]["baseline"]["runs"][
        "baseline"
    ]["test"]["nll"]
    assert (
        "same student trained without the teacher, seed 2." in student_card(with_evaluation(found, evaluated())).text
    )


# ---- What is missing ----


def test_old_results_do_not_turn_into_claims():
    found = results()
    del found["models"]
    text = student_card(found).text
    assert "distilled from vit-big" in text and "trained without a teacher" not in text
    assert "0.50 times its teacher's" in text and "source was not recorded" in text


SECTIONS = ("run", "data", "objectives", "models", "pairing", "evaluation", "student_evaluation")


@pytest.mark.parametrize("missing", [[one] for one in SECTIONS] + [list(SECTIONS)])
def test_a_missing_section_is_no_number(missing):
    found = {key: value for key, value in with_evaluation(results(), evaluated()).items() if key not in missing}
    card = student_card(found)
    assert "None" not in card.text and "nan" not in card.text.replace("naming", "")
    if "evaluation" in missing:
        assert "**Accuracy:** not measured." in card.text and card.data.eval_results is None
    if len(missing) > 1:
        assert "%" not in card.text.split("## How it was made")[0].replace("95%", "")


def test_a_validation_accuracy_is_called_one():
    found = results()
    for model in found["evaluation"]["models"].values():
        for seed in model["runs"].values():
            del seed["test"]
    del found["comparison"]
    for model in found["evaluation"]["models"].values():
        del model["images_per_second"]
    card = student_card(found)
    assert "**61.0 %** on 30 validation images, by which settings may have been chosen" in card.text
    assert [one.dataset_split for one in card.data.eval_results] == ["validation"]
    assert "Effect of the teacher:** not measured" in card.text


def test_images_with_and_without_labels_are_counted_apart():
    found = results()
    found["data"]["unlabelled"] = {"source": "rest", "labelled_images": 9, "unlabelled_images": 3300}
    text = student_card(found).text
    assert "distilled from owner/vit-big on 9 labelled and 3,300 unlabelled images of owner/pets." in text
    assert "images: 9 labelled train, 3,300 unlabelled train, 30 validation, 60 test" in text
    assert "- Trained on 9 labelled and 3,300 unlabelled images, 3 labelled ones per class on average." in text
    assert "The test images have the same source as the labelled training images." in text
    assert "images: 9 labelled train, 3,300 unlabelled train, 30 validation" in markdown(Results.of(found))
    assert "against the same student trained without it on the labelled images alone (" in text
    text = student_card(results()).text
    assert "trained without it (" in text
    assert "on 90 images of owner/pets." in text and "Trained on 90 images, 30 per class on average." in text


def test_the_card_of_features_claims_nothing_of_classes_and_shows_what_was_measured():
    found = {key: value for key, value in results(()).items() if key not in ("evaluation", "comparison")}
    found["models"]["student"]["architecture"] = "ViTModel"
    found["data"]["sizes"] = {"held out": 9, "train": 51}
    scores = {"parameters": 1_000_000, "agreement": 0.911, "cka": 0.945}
    found["embedding"] = {"images": 9, "models": {"student": scores}}
    text = student_card(found).text
    assert "**Similarity to the teacher inside:** agreement 0.911, CKA 0.945." in text
    limits = text.split("## Limits")[1].split("## Reproduce")[0]
    assert "- Trained on 51 images, without labels.\n" in limits and "on labelled images" in limits
    assert "accuracy" not in limits and "class" not in limits and "same source" not in limits
    scores["knn"] = 0.5
    assert "- kNN, linear probe and recall hold for" in student_card(found).text


def test_a_student_cut_in_stages_is_said_to_be():
    found = results() | {"stages": {"distilled-seed1": [{"stage": 1}, {"stage": 2}]}}
    assert "4 of the blocks of owner/vit-big, cut in 2 stages and trained after each." in student_card(found).text
    assert "stages" not in student_card(results()).text


def test_images_of_a_stream_have_no_number():
    found = results()
    del found["data"]["sizes"]["train"]
    assert "distilled from owner/vit-big on images of owner/pets." in student_card(found).text


def _set(found, keys, value):
    for key in keys[:-1]:
        found = found[key]
    found[keys[-1]] = value


RUNS = ("evaluation", "models")


@pytest.mark.parametrize(
    "keys",
    [
        *[(*RUNS, arm, "runs", seed, "test", metric) for metric in ("accuracy", "nll", "ece")
          for arm, seed in (("distilled", "1"), ("distilled", "2"), ("alone", "1"), ("teacher", "teacher"))],
        (*RUNS, "teacher", "images_per_second"), ("run",), ("run", "processes"), ("data",), ("models",),
        ("data", "sizes", "train"), ("models", "pairing"), ("models", "student"), ("pairing", "notes"),
        ("student_evaluation", "evaluation", "models", "baseline", "runs", "baseline", "test", "nll"),
    ],
)  # fmt: skip
def test_null_is_not_measured(keys):
    found = with_evaluation(results(), evaluated())
    _set(found, keys, None)
    for judged in (found, {name: value for name, value in found.items() if name != "student_evaluation"}):
        text = student_card(judged).text
        assert "None" not in text and "nan" not in text.replace("naming", "")


@pytest.mark.parametrize(
    "keys, value, section",
    [
        (("student_evaluation", "evaluation", "models", "student", "confusion"), None, "student_evaluation"),
        ((*RUNS, "distilled", "runs", "1", "test", "accuracy"), "much", "evaluation"),
        (("objectives",), "task", "objectives"),
        (("run",), "x", "run"),
        (("data", "sizes"), [3], "data"),
        ((*RUNS, "distilled", "runs", "1", "test", "accuracy"), 1.7, "evaluation"),
    ],
)
def test_what_is_malformed_is_one_error_that_names_the_section(keys, value, section):
    found = with_evaluation(results(), evaluated())
    _set(found, keys, value)
    with pytest.raises(ValueError, match=rf"results\.json, section {section}[ :].*Restore the file"):
        student_card(found)


def test_an_evaluation_with_another_accuracy_is_refused():
    found = results()
    found["evaluation"]["models"]["distilled"]["runs"]["1"]["test"]["accuracy"] = 0.9
    with pytest.raises(ValueError, match=r"test accuracy of 90\.0 % .* of the same student 60\.0 %"):
        with_evaluation(found, evaluated())


# ---- Metadata ----


def test_metadata_and_model_index_are_read_back():
    card = ModelCard(str(student_card(results(), model_id="me/small", tags="mine", language="en")))
    data = card.data
    assert {one.metric_type: one.metric_value for one in data.eval_results} == SCORES
    assert {one.dataset_type for one in data.eval_results} == {"owner/pets"} == set(data.datasets)
    assert data.license == "apache-2.0" and data.library_name == "transformers" and data.language == ["en"]
    assert data.pipeline_tag == "image-classification" and data.base_model == "owner/vit-big"
    assert data.base_model_relation == "finetune"  # cut out of a teacher on the Hub
    assert data.tags == ["hf_kdtl", "knowledge-distillation", "logit_kd", "mine"]
    name, back = model_index_to_eval_results(eval_results_to_model_index("small", data.eval_results))
    assert name == "small" == data.model_name and back == data.eval_results


def test_trainers_keywords_are_taken():
    card = student_card(
        results(), license="mit", language="en", tags=["a", "b"], model_name="tiny", finetuned_from="owner/start",
        tasks="image-classification", dataset_tags="other/set", dataset="Other Set", dataset_args="small",
    )  # fmt: skip
    data = card.data
    assert data.license == "mit" and data.tags[-2:] == ["a", "b"] and card.text.lstrip().startswith("# tiny\n")
    assert data.base_model == ["owner/start", "owner/vit-big"] and data.datasets == ["other/set"]
    assert {(one.dataset_name, one.dataset_config) for one in data.eval_results} == {("Other Set", "small")}


def test_trainers_keywords_may_be_paths_and_name_none():
    Path("runs/mine").mkdir(parents=True)
    for path in ("/data/zoe/John Smith/x", "~/zoe/x", "file:///data/zoe/x"):
        names = "finetuned_from", "dataset", "dataset_args", "dataset_tags", "model_name", "tags"
        every = dict.fromkeys(names, path)
        card = student_card(results(), **every)
        assert "zoe" not in str(card) and "Smith" not in str(card)
        assert card.data.base_model == "owner/vit-big" and card.data.datasets == ["owner/pets"]
        assert {one.dataset_name for one in card.data.eval_results} == {"x"} and card.text.lstrip().startswith("# x\n")
    assert student_card(results(), finetuned_from="runs/mine").data.base_model == "owner/vit-big"  # a folder here


def test_adapters_are_reported():
    found = results()
    found["models"]["student"] |= {"adapters": {"default": "LORA"}}
    found["models"]["student"]["start"] = {"how": "pretrained", "name": "owner/base", "hub": True, "revision": "9f",
                                           "licence": "cc-by-nc-4.0"}  # fmt: skip
    card = student_card(found, model_id="me/small")
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert card.data.base_model == ["owner/base", "owner/vit-big"] and card.data.license == "cc-by-nc-4.0"
    assert '"owner/base", num_labels=3' in card.text and "adapters (default: LORA), saved alone" in card.text
    found["models"]["student"]["merged"] = True
    full = student_card(found, model_id="me/small")
    assert full.data.library_name == "transformers" and full.data.base_model_relation == "finetune"
    assert "merged into its weights" in full.text and "pipeline(" in full.text
    with pytest.raises(ValueError, match=r"cc-by-nc-4.0 and mit"):
        student_card(found, license="mit")


def test_a_license_that_is_not_known_is_reported_and_a_forbidding_one_refused():
    found = results()
    found["models"]["teacher"]["licence"] = None
    card = student_card(found)
    assert card.data.license is None and "not determined: its teacher's license is not known" in card.text
    assert "mit, chosen by the publisher" in student_card(found, license="mit").text
    found["models"]["teacher"]["licence"] = "cc-by-nd-4.0"
    with pytest.raises(ValueError, match="no derivatives"):
        student_card(found, license="mit")


# ---- What could break it ----


def test_the_license_of_a_student_without_a_teacher_is_that_of_its_start():
    found = results()
    del found["models"]["teacher"]
    start = {"how": "pretrained", "name": "owner/base", "hub": True, "licence": None}
    found["models"]["student"]["start"] = start
    assert "the license of the model that it began as is not known. Ask" in student_card(found).text
    start["licence"] = "mit"
    assert "**License:** mit, as of the model that it began as." in student_card(found).text


def test_nasty_names_leave_structure_and_metadata_as_they_are():
    plain, hostile = (
        student_card(with_evaluation(results(names), evaluated(names)), dataset=names[0], model_name=names[1])
        for names in (["cat", "dog", "emu"], NASTY[:3])
    )
    assert [kind for kind, _ in body(plain)] == [kind for kind, _ in body(hostile)]
    assert yaml.safe_load(str(hostile).split("\n---\n")[0].removeprefix("---\n"))["license"] == "apache-2.0"
    assert hostile.data.eval_results[0].dataset_name == "a|b"


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_name_anywhere_is_only_text(name):
    def shape(word):
        found = with_evaluation(results([word, "dog", "emu"]), evaluated([word, "dog", "emu"]))
        found["models"]["teacher"] |= {"name": word, "hub": False, "revision": None}
        found["models"]["student"]["start"] = {"how": "pretrained", "name": word, "licence": "mit"}
        found["models"]["pairing"] = {word: f"student  teacher\n{word}\n```\n# out of the block"}
        found["data"] |= {"source": f"{word} x", "hub": False, "notes": [word], "augmentation": {"crop": word}}
        found["run"]["settings"] |= {"start": word, "run": {"deep": [word]}}
        found["objectives"] += [{"name": "logit_kd", "key": word, "weight": 1.0}]
        card = student_card(found, tags=[word], model_name=word)
        read = ModelCard(str(card))
        assert read.text == card.text and set(read.data.to_dict()) == set(card.data.to_dict())
        assert read.data.license == "apache-2.0"
        return [kind for kind, _ in body(card)]

    assert shape(name) == shape("cat")


@pytest.mark.parametrize("name", NASTY)
def test_inline_is_text_in_every_place(name):
    parse = MarkdownIt("commonmark").enable("table").parse
    shown = inline(name)
    assert "\n" not in shown
    for place in ("{}", "- {}", "# {}", "| a | b |\n|---|---|\n| {} | x |", "a sentence, {} and more", "**bold:** {}"):
        kinds = [token.type for token in parse(place.format(shown))]
        assert kinds == [token.type for token in parse(place.format("word"))], place
        inner = {child.type for token in parse(place.format(shown)) for child in token.children or ()}
        assert inner <= {"text", "strong_open", "strong_close"}, place
    code = parse(fenced(f"{name}\n```\n# {name}", "yaml"))
    assert [token.type for token in code] == ["fence"]


def test_inline_cuts_escapes_once_and_leaves_markdown():
    assert len(inline("x" * 2000)) == 1000 and inline("x" * 9, 4) == "xxx…"
    assert inline(inline("a|b")) == r"a\|b" and inline(Markdown("**b**")) == "**b**" and inline(-1.5) == "-1.5"
    assert table([["a", "b"], ["x|y", Markdown("**1**")]]).splitlines()[2] == r"| x\|y | **1** |"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("see /home/me/runs/vit.", "see vit."),
        ("~/data/pets holds", "pets holds"),
        ("'../shared/x' and C:\\Users\\me\\m", "'x' and m"),
        ("owner/name, 3/4 of a/b, 1 / 2", "owner/name, 3/4 of a/b, 1 / 2"),
        ("https://host.org/page", "https://host.org/page"),
        ("the dataset /data/John Smith/cats is", "the dataset cats is"),
        ("see file:///home/ann/x", "see x"),
        ("about ~5 % of them, n/a", "about ~5 % of them, n/a"),
    ],
)
def test_without_paths(text, shown):
    assert without_paths(text) == shown


def test_relative_paths_are_no_names(tmp_path):
    """A teacher or data by a relative path: neither card nor published results.json hold it; the local ones do."""
    Path("runs/secret").mkdir(parents=True)
    found = results()
    found["models"]["teacher"] |= {"name": "runs/vit/model", "hub": False}
    found["data"] |= {"source": "runs/secret", "hub": False}
    settings = {"teacher": "away/vit", "dataset": "runs/secret", "notes": "see runs/secret", "student_config": "a/b/c"}
    found["run"]["settings"] |= settings
    Path("one/slash").mkdir(parents=True)
    message = "train/validation/test of one/slash"
    found["pairing"]["notes"] = [f"away/vit and runs/vit/model/x.json are {message}"]
    public = published(found)
    assert (
        public["run"]["settings"]
        | {"teacher": "vit", "dataset": "secret", "notes": "see secret", "student_config": "c"}
    ) == public["run"]["settings"]
    assert public["pairing"]["notes"] == [f"vit and x.json are {message}"]
    assert public["data"]["source"] == "secret" and public["models"]["teacher"]["name"] == "vit"
    assert published(public) == public and found["run"]["settings"]["teacher"] == "away/vit"
    card = str(student_card(found))
    assert not any(path in card for path in ("runs/", "away/")) and "vit" in card
    found["models"]["teacher"] |= {"name": "google/vit", "hub": True}
    found["run"]["settings"]["teacher"] = "google/vit"
    assert published(found)["run"]["settings"]["teacher"] == "google/vit"


def test_no_path_gets_out():
    found = with_evaluation(results(), evaluated())
    found["data"]["source"], found["data"]["hub"] = "/home/me/images of cats", False
    found["run"]["settings"] |= {"student": "~/models/mine/", "start": "C:\\Users\\me\\start", "dataset": "/home/me/x"}
    text = str(student_card(found))
    assert "/home" not in text and "secret" not in text and "Users" not in text and "~/" not in text
    assert "images of cats" in text and "vit-big" in text and "path" not in json.dumps(found["student_evaluation"])


def test_origin_names_no_folder(tmp_path):
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert origin(tmp_path / "mine" / "model") == {"name": "mine", "hub": False, "revision": None, "licence": None}
    assert origin(f"{tmp_path}/mine")["licence"] == "mit"
    assert origin("/nowhere/at/all")["name"] == "all" and not origin("/nowhere/at/all")["hub"]
    assert origin("owner/name", "abc") == {"name": "owner/name", "hub": True, "revision": "abc", "licence": None}
    assert origin(None)["name"] is None


# ---- Whose results ----


@pytest.mark.parametrize(
    "change, message",
    [({"schema": 7}, "schema 7"), ({"run": {"recipe": "compare_runs"}}, "'compare_runs'"), (None, "schema None")],
)
def test_results_of_another_schema_or_recipe_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        student_card(results() | change if change is not None else {})


@pytest.mark.parametrize("name", ["../x", "a b", "a/b/c", 'x", trust_remote_code=True', "https://x.org/y"])
def test_a_model_id_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="expected a name on the Hub"):
        student_card(results(), model_id=name)


def _other(section, **changed):
    value = evaluated()
    where = value
    for key in section:
        where = where[key]
    where |= changed
    return value


@pytest.mark.parametrize(
    "its, message",
    [
        (_other([], schema=3), "schema 3"),
        (_other(["run"], recipe="distill"), "found results of 'distill'"),
        (_other(["data"], source="other/pets"), "other data: source"),
        (_other(["data"], classes=["cat", "dog"]), "other data: classes"),
        (_other(["data"], digests={"test": "b"}), "have other test images"),
        (_other(["data", "sizes"], test=61), "60 test images and the evaluation 61"),
        (_other(["evaluation", "models", "student"], fingerprint="s2"), "another student: the run's has weights s1"),
        (_other(["evaluation", "models", "teacher"], fingerprint="t2"), "teacher has other weights"),
        (_other(["evaluation"], split="validation"), "expected --split test"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(its, message):
    mine = results()
    mine["data"]["digests"] = {"test": "a"}
    with pytest.raises(ValueError, match=message):
        with_evaluation(mine, its)


def test_an_evaluation_may_list_the_classes_in_another_order_and_type_the_path_otherwise():
    its = evaluated()
    its["data"]["source"] = f"./{its['data']['source']}/"
    its["data"]["classes"] = its["data"]["classes"][::-1]
    assert str(student_card(with_evaluation(results(), its))) == str(
        student_card(with_evaluation(results(), evaluated()))
    )


def test_a_run_without_a_fingerprint_takes_no_evaluation():
    found = results()
    found["models"]["student"]["fingerprint"] = None
    its = _other(["evaluation", "models", "student"], fingerprint=None)
    with pytest.raises(ValueError, match="another student"):
        with_evaluation(found, its)


def test_of_several_students_this_one_is_taken():
    its = evaluated()
    models, fidelity = its["evaluation"]["models"], its["evaluation"]["fidelity"]
    mine = models.pop("student")
    other = copy.deepcopy(mine) | {"fingerprint": "s9", "runs": {"student b": mine["runs"]["student"]}}
    mine["runs"] = {"student a": mine["runs"]["student"]}
    its["evaluation"]["models"] = {"student b": other, "student a": mine} | models
    its["evaluation"]["fidelity"] = {"student b": {}, "student a": fidelity["student"]}
    found = with_evaluation(results(), its)["student_evaluation"]["evaluation"]
    assert list(found["models"]) == ["student", "teacher", "baseline"] and list(found["fidelity"]) == ["student"]
    assert found["models"]["student"]["fingerprint"] == "s1"
    assert "mean 0.25" in student_card(with_evaluation(results(), its)).text


def test_the_command_merges_and_renders(capsys, monkeypatch):
    main = importlib.import_module("hf_kdtl.commands.model_card").main
    for folder, found in (("mine", results()), ("its", evaluated())):
        for section, value in found.items():
            if section != "schema":
                update_results(folder, section, value)
    main(["--runs", "mine", "--evaluation", "its"])
    assert "mine/README.md" in capsys.readouterr().out
    first = Path("mine/README.md").read_text()
    assert first.split("---\n")[2].lstrip().startswith("# mine\n") and "**60.0 %** on 60 test images" in first
    main(["--runs", "mine"])
    assert Path("mine/README.md").read_text() == first


# ---- From a trainer ----


def test_a_trainer_has_results_of_its_own():
    student, teacher = pair()
    run = trainer("out", student, teacher, max_steps=2, eval_dataset=Images(8), seed=3,
                  objectives=[{"name": "task"}, {"name": "attention_map", "layers": "last"}],
                  layer_rates={"mode": "discrepancy"}, gradient_rule={"name": "never_hurt"})  # fmt: skip
    run.compute_metrics = compute_metrics
    run.train()
    accuracy = run.evaluate()["eval_accuracy"]
    found = results_of(run)
    assert json.loads(json.dumps(found)) == found and set(found["layer_rates"]["run"]["history"][0]) >= {"multipliers"}
    assert found["models"]["student"]["fingerprint"] == model_facts(run.model)["fingerprint"]
    tables = found["models"]["pairing"]
    assert list(tables) == ["attention_map", "layer_rates"]
    assert tables["attention_map"].count("\n") == 2 < tables["layer_rates"].count("\n")
    card = student_card(found)
    assert f"**{100 * accuracy:.1f} %** on 8 validation images" in card.text
    assert {one.metric_type: one.metric_value for one in card.data.eval_results}["accuracy"] == accuracy
    assert "for DistillationTrainer" in card.text and "wan2019towards" in card.text
    assert "16 images" in card.text and "not the" not in card.data.tags


@pytest.mark.parametrize(("accuracy", "shown"), [(1.0, "all of them are right"), (0.0, "none of them are right")])
def test_an_accuracy_without_spread_has_no_interval(accuracy, shown):
    assert _interval(accuracy, 60) == f"no interval over images: {shown}"
    assert _interval(accuracy, None) == "95% interval not measured"


def test_a_student_that_taught_itself():
    student, _ = pair()
    plain = model_facts(student)
    adapted = get_peft_model(student, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    run = DistillationTrainer(adapted, config("out", max_steps=1), teacher="self", train_dataset=Images())
    run.train()
    models = results_of(run)["models"]
    assert models["teacher"]["fingerprint"] == plain["fingerprint"] != models["student"]["fingerprint"]
    assert models["teacher"]["parameters"] == plain["parameters"] < models["student"]["parameters"]
    assert models["student"]["adapters"] == {"default": "LORA"} and models["student"]["trainable"] < 5000
    assert made_from(run).teacher is None  # it is the student, and started as what that started as
    run.save_model("small")
    assert models["student"]["fingerprint"] == student_hash(adapted) == saved_hash(Path("small"), adapter=True)
    card = student_card(results_of(run), model_id="me/small")
    assert "(the student with its adapters off) on 16 images." in card.text and card.data.library_name == "peft"
    assert "an image classifier for 3 classes (unnamed)." in card.text


def test_the_lines_that_open_adapters_do():
    build("vit", num_labels=5).save_pretrained("base")  # a head of other classes
    full = AutoModelForImageClassification.from_pretrained("base", num_labels=3, ignore_mismatched_sizes=True)
    adapted = get_peft_model(full, LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
    run = trainer("out", adapted, max_steps=1)
    run.save_model("small")
    code = student_card(results_of(run)).text.split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("path/to/this/folder", "small"), found)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(found["student"](pixels).logits, run.model.eval()(pixels).logits)


def test_weights_tell_models_apart():
    student, _ = pair()
    facts = model_facts(student)
    assert facts["architecture"] == "ViTForImageClassification" and facts["image_size"] == [32, 32]
    assert facts["parameters"] == sum(p.numel() for p in student.parameters())
    with torch.no_grad():
        next(student.parameters()).add_(1)
    assert model_facts(student)["fingerprint"] != facts["fingerprint"]
