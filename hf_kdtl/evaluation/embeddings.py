"""How good embeddings are for a task that they were not trained on, and how alike two models' are."""

from __future__ import annotations

from typing import Any

import numpy as np

NEIGHBOURS, TEMPERATURE = 20, 0.07
GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths C of the probe's regularization that are tried."""


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64; a zero row stays."""
    x = np.asarray(x, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def knn_accuracy(
    bank: np.ndarray, bank_labels: np.ndarray, x: np.ndarray, labels: np.ndarray, k: int = NEIGHBOURS
) -> float:
    """Accuracy of the k nearest neighbours by cosine, each weighted by exp(cos / .07), in [0, 1].

    Args:
        bank, bank_labels: (n, D) embeddings with labels (n,), which answer.
        x, labels: (m, D) and (m,), which are asked for.
        k: neighbours, at most n.

    Cost: O(n m D), 1,000 rows at a time.

    Source: the protocol of DINO, arXiv 2104.14294 [review].

    >>> eye = np.eye(2)
    >>> knn_accuracy(eye, np.array([0, 1]), eye, np.array([0, 0]), k=1)
    0.5
    """
    entries, names = unit_rows(bank), np.unique(bank_labels)
    k, right = min(k, len(entries)), 0
    for first in range(0, len(x), 1000):
        cosines = unit_rows(x[first : first + 1000]) @ entries.T
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        weights = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / TEMPERATURE)
        votes = np.stack([(weights * (bank_labels[nearest] == name)).sum(1) for name in names], 1)
        right += int((names[votes.argmax(1)] == labels[first : first + 1000]).sum())
    return right / len(x)


def probe_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> dict[str, float]:
    """Accuracy of a logistic regression on standardised embeddings, its C chosen on validation, of equals the smaller.

    Args:
        train, validation, test: embeddings (n, D) and labels (n,).

    Returns:
        {"validation", "test": accuracy in [0, 1], "C"}.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found: list[tuple[float, float, float]] = []
    for strength in GRID:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        probe.fit(*train)
        found.append((probe.score(*validation), -strength, probe.score(*test)))
    best = max(found)
    return {"validation": float(best[0]), "test": float(best[2]), "C": -best[1]}


def recall_at(x: np.ndarray, labels: np.ndarray, ranks: tuple[int, ...] = (1, 5)) -> dict[int, float]:
    """{r: share of images with an image of their class among the r nearest others by cosine}, in [0, 1].

    >>> recall_at(np.array([[1.0, 0], [0.9, 0.1], [0, 1.0]]), np.array([0, 0, 1]), (1,))
    {1: 0.6666666666666666}
    """
    entries, hits = unit_rows(x), dict.fromkeys(ranks, 0)
    for first in range(0, len(x), 1000):
        cosines = entries[first : first + 1000] @ entries.T
        rows = np.arange(len(cosines))
        cosines[rows, rows + first] = -np.inf
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : max(ranks)]
        same = labels[nearest] == labels[first : first + 1000, None]
        hits = {r: hits[r] + int(same[:, :r].any(1).sum()) for r in ranks}
    return {r: count / len(x) for r, count in hits.items()}


def agreement(student: np.ndarray, teacher: np.ndarray, ridge: float = 1e-3) -> float:
    """Mean cosine of the teacher's embeddings and the student's after the best linear map, in [-1, 1].

    The map is fitted by least squares (a ridge of `ridge` times the mean variance) to the even rows and judged on the
    odd ones; both sides less the even rows' mean.

    >>> x = np.random.default_rng(0).normal(size=(40, 3))
    >>> round(agreement(x, x @ np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 2]])), 3)
    1.0
    """
    s, t = (np.asarray(x, np.float64) for x in (student, teacher))
    s, t = s - s[::2].mean(0), t - t[::2].mean(0)
    gram = s[::2].T @ s[::2]
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    mapped = s[1::2] @ np.linalg.solve(gram, s[::2].T @ t[::2])
    return float((unit_rows(mapped) * unit_rows(t[1::2])).sum(1).mean())


def linear_cka(student: np.ndarray, teacher: np.ndarray) -> float:
    """Linear CKA of two sets of embeddings (n, D) and (n, D'), centred, in [0, 1]; biased for n near D."""
    s, t = (x - x.mean(0) for x in (np.asarray(student, np.float64), np.asarray(teacher, np.float64)))
    cross, own = np.square(s.T @ t).sum(), np.linalg.norm(s.T @ s) * np.linalg.norm(t.T @ t)
    return float(cross / own) if own else float("nan")


def principal_colors(tokens: np.ndarray) -> np.ndarray:
    """(n, P, 3) in [0, 1]: the first three principal components of the patch tokens (n, P, D) of all images, each
    scaled between its 2nd and 98th percentile. A component's sign is that of its largest loading."""
    flat = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    shown = directions[:3]
    shown = shown * np.sign(shown[np.arange(len(shown)), np.abs(shown).argmax(1)])[:, None]
    parts: Any = flat @ shown.T
    low, high = np.quantile(parts, (0.02, 0.98), axis=0)
    scaled = np.clip((parts - low) / np.where(high > low, high - low, 1.0), 0, 1)
    if scaled.shape[1] < 3:
        scaled = np.pad(scaled, ((0, 0), (0, 3 - scaled.shape[1])))
    return scaled.reshape(*tokens.shape[:2], 3)
