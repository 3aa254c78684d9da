"""Scores of embeddings against slow references, and what each must show."""

import numpy as np
import pytest

from hf_kdtl.evaluation import embeddings as ee

DRAW = np.random.default_rng(0)


def _clusters(n, shift=0.0):
    labels = np.arange(n) % 3
    return np.eye(3)[labels] * 5 + DRAW.normal(size=(n, 3)) * 0.1 + shift, labels


def test_knn_is_the_weighted_vote_of_the_nearest():
    bank, names = DRAW.normal(size=(30, 4)), DRAW.integers(0, 3, 30)
    x, labels = DRAW.normal(size=(11, 4)), DRAW.integers(0, 3, 11)
    right = 0
    for one, label in zip(x, labels, strict=True):
        cosines = [float(one @ b / np.linalg.norm(one) / np.linalg.norm(b)) for b in bank]
        votes = dict.fromkeys(range(3), 0.0)
        for j in sorted(range(30), key=lambda j: -cosines[j])[:7]:
            votes[int(names[j])] += np.exp(cosines[j] / 0.07)
        right += max(votes, key=votes.get) == label
    assert ee.knn_accuracy(bank, names, x, labels, k=7) == right / 11
    assert ee.knn_accuracy(bank, names, 3 * x, labels, k=7) == right / 11  # lengths do not count


def test_clusters_are_found_by_all():
    train, validation, test = (_clusters(n) for n in (30, 15, 12))
    assert ee.knn_accuracy(*train, *test) == 1
    probe = ee.probe_accuracy(train, validation, test)
    assert probe["test"] == probe["validation"] == 1 and probe["C"] == 1e-3  # the smallest of equals
    assert ee.recall_at(*test) == {1: 1.0, 5: 1.0}


def test_recall_leaves_the_image_itself_out():
    x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert ee.recall_at(x, np.array([0, 1, 1]), (1, 2)) == {1: 1 / 3, 2: 2 / 3}


def test_agreement_sees_through_linear_maps_and_not_through_noise():
    x = DRAW.normal(size=(200, 6))
    assert ee.agreement(x, x @ DRAW.normal(size=(6, 4)) + 3) > 0.999
    assert abs(ee.agreement(DRAW.normal(size=(200, 6)), x)) < 0.2
    rotation, _ = np.linalg.qr(DRAW.normal(size=(6, 6)))
    assert ee.linear_cka(x, 2 * x @ rotation + 1) == pytest.approx(1)


def test_colors_follow_what_differs_most():
    tokens = np.zeros((2, 4, 5))
    tokens[:, :2, 3] = 10
    tokens += 0.01 * DRAW.normal(size=tokens.shape)
    colors = ee.principal_colors(tokens)
    assert colors.shape == (2, 4, 3) and colors.min() >= 0 and colors.max() <= 1
    assert (colors[:, :2, 0] > 0.9).all() and (colors[:, 2:, 0] < 0.1).all()
