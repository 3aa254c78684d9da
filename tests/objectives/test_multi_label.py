"""Several labels an image: binary cross-entropy and the divergence of each class, against references in float64."""

import math

import pytest
import torch

from hf_kdtl import DistillationTrainer
from hf_kdtl.evaluation.metrics import compute_metrics
from hf_kdtl.functional.multi_label import check_multi_labels
from hf_kdtl.models.labels import MULTI_LABEL
from hf_kdtl.models.teachers.text_head import TextHeadTeacher
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.preflight import preflight
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.text import build_text
from tests.support.tiny import build

KD = [{"name": "task", "weight": 0.5}, {"name": "logit_kd"}]


class Several(Images):
    """Random labels of each class; of every third image the first class is not known, of every fourth none is."""

    def __init__(self, number=16, masked=True, seed=0):
        super().__init__(number, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (number, 3), generator=generator).float()
        if masked:
            self.labels[::3, 0] = -100
            self.labels[::4] = -100


def several(seed=0, **options):
    model = build("vit", seed=seed, **options)
    model.config.problem_type = MULTI_LABEL
    return model


def trained(folder, entries=KD, teacher=None, data=None, student=None, **settings):
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "optim": "sgd",
        "learning_rate": 0.05,
    } | settings
    given = several(seed=5) if teacher is None else teacher or None
    runner = DistillationTrainer(
        student or several(), config(folder, entries, **settings), teacher=given, train_dataset=data or Several()
    )
    runner.train()
    return runner


def bce(z, y):
    terms = [-(t * math.log(p) + (1 - t) * math.log(1 - p)) for v, t in zip(z, y, strict=True) if t != -100
             for p in [1 / (1 + math.exp(-v))]]  # fmt: skip
    return sum(terms) / len(terms) if terms else 0.0


def bernoulli(z_t, z_s, tau, direction):
    def kl(a, b):
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    total = 0.0
    for t, s in zip(z_t, z_s, strict=True):
        p, q = (1 / (1 + math.exp(-v / tau)) for v in (t, s))
        m = (p + q) / 2
        total += {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[direction]
    return tau**2 * total / len(z_t)


def terms(student, teacher, entries, data, folder):
    runner = DistillationTrainer(student, config(folder, entries), teacher=teacher, train_dataset=data)
    batch = {"pixel_values": data.pixels, "labels": data.labels}
    with torch.no_grad():
        z_s, z_t = (model(pixel_values=data.pixels).logits.double().tolist() for model in (student.eval(), teacher))
    return runner.objective_terms(batch), z_s, z_t


def test_values_equal_the_references(tmp_path):
    data, student, teacher = Several(12), several(), several(seed=5)
    entries = [{"name": "task"}, *({"name": "logit_kd", "key": f"kd_{d}", "direction": d, "temperature": 2.0}
               for d in ("forward", "reverse", "jsd"))]  # fmt: skip
    found, z_s, z_t = terms(student, teacher, entries, data, tmp_path)
    expected = torch.tensor([bce(z, y) for z, y in zip(z_s, data.labels.tolist(), strict=True)])
    assert (found["task"] - expected).abs().max() < 1e-6 and (expected == 0).sum() == 3
    for name in ("forward", "reverse", "jsd"):
        expected = torch.tensor([bernoulli(t, s, 2.0, name) for t, s in zip(z_t, z_s, strict=True)])
        assert (found[f"kd_{name}"] - expected).abs().max() < 1e-6 and expected.min() > 0, name


def test_kd_is_zero_at_the_teacher_and_finite_at_extreme_logits():
    kd = OBJECTIVES["logit_kd"](temperature=3.0)
    kd.multi_label = True

    class Of:
        def __init__(self, logits):
            self.logits = logits

    z = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    same = kd(Of(z), Of(z.detach()), {})
    other = kd(Of(z), Of(-z.detach()), {})
    assert same.item() == 0 and torch.isfinite(other).all()
    assert torch.isfinite(torch.autograd.grad(other.sum(), z)[0]).all()
    assert torch.isfinite(kd(Of(z.bfloat16()), Of(-z.detach().bfloat16()), {})).all()


def test_the_split_changes_nothing_and_the_loss_is_over_the_labelled_images(tmp_path):
    whole = trained(tmp_path / "a", per_device_train_batch_size=8)
    parts = trained(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert largest_difference(weights(whole.model), weights(parts.model)) < 1e-6
    assert largest_difference(weights(whole.model), weights(several())) > 1e-4
    data = Several(12)
    runner = DistillationTrainer(several(), config(tmp_path, KD), teacher=several(seed=5), train_dataset=data,
                                 eval_dataset=data, compute_metrics=compute_metrics)  # fmt: skip
    scores = runner.evaluate()
    with torch.no_grad():
        z = runner.model(pixel_values=data.pixels).logits.double().tolist()
    known = [bce(v, y) for v, y in zip(z, data.labels.tolist(), strict=True) if set(y) != {-100.0}]
    assert scores["eval_loss"] == pytest.approx(sum(known) / len(known), rel=1e-5) and len(known) == 9
    assert {"eval_map", "eval_micro_f1", "eval_macro_f1"} <= scores.keys() and "eval_accuracy" not in scores


def test_only_the_task_is_plain_binary_cross_entropy(tmp_path):
    data = Several(8, masked=False)
    found, z_s, _ = terms(several(), several(seed=5), KD, data, tmp_path)
    own = torch.nn.BCEWithLogitsLoss()(torch.tensor(z_s), data.labels.double())
    assert found["task"].mean().item() == pytest.approx(own.item(), rel=1e-6)


def test_features_attention_and_logit_jacobians_work(tmp_path):
    names = ("hidden_states", "attention_map", "attention_transfer", "relation", "jacobian", "attention_jacobian",
             "hessian", "l2_sp", "bss")  # fmt: skip
    trained(tmp_path, [{"name": name, "weight": 0.1} for name in names] + KD, max_steps=1)


@pytest.mark.parametrize(("entry", "match"), [
    ({"name": "decoupled_kd"}, "of one class an image"),
    ({"name": "dist"}, "of one class an image"),
    ({"name": "noisy_kd"}, "of one class an image"),
    ({"name": "lwf"}, "of one class an image"),
    ({"name": "jacobian", "distance": "fisher", "output": "all"}, "'fisher' is of a soft-max"),
    ({"name": "jacobian", "of": "logprob"}, "'logprob' is of a soft-max"),
    ({"name": "jacobian", "output": "label"}, "the image's one label"),
    ({"name": "jacobian_norm"}, "the image's one label"),
    ({"name": "delta"}, "one label an image"),
    ({"name": "logit_kd", "hard": True}, "hard is of one class"),
    ({"name": "logit_kd", "standardize": True}, "standardize is of one class"),
    ({"name": "task", "label_smoothing": 0.1}, "label_smoothing is of one class"),
], ids=str)  # fmt: skip
def test_what_is_of_one_class_an_image_is_refused_by_name(tmp_path, entry, match):
    with pytest.raises(ValueError, match=rf"objective '{entry['name']}': the student has several labels.*{match}"):
        trained(tmp_path, [entry], teacher=several(seed=5) if OBJECTIVES[entry["name"]].needs_teacher else False)


def test_teachers_of_one_class_an_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a probability of each"):
        trained(tmp_path, teacher=build("vit", seed=5))
    trained(tmp_path, [{"name": "hidden_states"}, KD[0]], teacher=build("vit", seed=5), max_steps=1)
    one = build("vit")
    with pytest.raises(ValueError, match=f"the teacher's problem_type is '{MULTI_LABEL}'"):
        trained(tmp_path, student=one, data=Images(8))


def test_a_text_head_answers_by_its_sigmoid(tmp_path):
    student = several()
    student.config.id2label = {0: "cat", 1: "dog", 2: "emu"}
    trained(tmp_path, teacher=TextHeadTeacher(*build_text("siglip")), student=student, max_steps=1)


def test_preflight_tries_them(tmp_path):
    found = preflight(several(), several(seed=5), config(tmp_path, [*KD, {"name": "dist"}]))
    assert [cost.key for cost in found.costs] == ["logit_kd"]
    assert len(found.problems) == 1 and "objective 'dist': the student has several labels" in found.problems[0]


def test_labels_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the labels have the shape"):
        trained(tmp_path, data=Images(8))
    with pytest.raises(ValueError, match="the labels hold 2; expected 1 where the class is there"):
        check_multi_labels(torch.tensor([[0.0, 2.0]]), 2)
