"""Metrics the slow, obvious way: one image and one class at a time, in float64, straight from the definitions.

Every function takes lists: rows of logits, and labels, of which -100 is no label.
"""

import math


def softmax(row):
    highest = max(row)
    powers = [math.exp(z - highest) for z in row]
    return [power / sum(powers) for power in powers]


def first_largest(row):
    best = 0
    for k, z in enumerate(row):
        if z > row[best]:
            best = k
    return best


def _labelled(logits, labels):
    return [(row, y) for row, y in zip(logits, labels, strict=True) if y != -100]


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def accuracy(logits, labels):
    return _mean(first_largest(row) == y for row, y in _labelled(logits, labels))


def top5(logits, labels):
    # Python's sort is stable: of equal logits the first class comes first.
    ranks = [(sorted(range(len(row)), key=lambda k, row=row: -row[k]), y) for row, y in _labelled(logits, labels)]
    return _mean(y in order[:5] for order, y in ranks)


def mean_class_accuracy(logits, labels):
    found = {}
    for row, y in _labelled(logits, labels):
        found.setdefault(y, []).append(first_largest(row) == y)
    return _mean(_mean(right) for right in found.values())


def nll(logits, labels):
    return _mean(-math.log(softmax(row)[y]) for row, y in _labelled(logits, labels))


def brier(logits, labels):
    def one(row, y):
        return sum((p - (k == y)) ** 2 for k, p in enumerate(softmax(row)))

    return _mean(one(row, y) for row, y in _labelled(logits, labels))


def ece(logits, labels):
    pairs = [(max(softmax(row)), first_largest(row) == y) for row, y in _labelled(logits, labels)]
    total = 0.0
    for b in range(15):
        inside = [(c, right) for c, right in pairs if b / 15 < c <= (b + 1) / 15 or (b == 0 and c == 0)]
        if inside:
            gap = abs(_mean(right for _, right in inside) - _mean(c for c, _ in inside))
            total += len(inside) / len(pairs) * gap
    return total


def confusion(logits, labels):
    table = [[0] * len(logits[0]) for _ in logits[0]]
    for row, y in _labelled(logits, labels):
        table[y][first_largest(row)] += 1
    return table


def agreement(student, teacher):
    return _mean(first_largest(s) == first_largest(t) for s, t in zip(student, teacher, strict=True))


def teacher_kl(student, teacher):
    def one(s, t):
        return sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(t), softmax(s), strict=True))

    return _mean(one(s, t) for s, t in zip(student, teacher, strict=True))


def agreement_teacher_wrong(student, teacher, labels):
    wrong = [
        (s, t)
        for s, t, y in zip(student, teacher, labels, strict=True)
        if y != -100 and first_largest(t) != y
    ]  # fmt: skip
    return _mean(first_largest(s) == first_largest(t) for s, t in wrong)


def negative_flip_rate(predictions, labels, baseline):
    rows = [(p, y, b) for p, y, b in zip(predictions, labels, baseline, strict=True) if y != -100]
    return _mean(first_largest(b) == y and first_largest(p) != y for p, y, b in rows)


def map(logits, labels):
    found = []
    for k in range(len(logits[0])):
        known = [(row[k], y[k]) for row, y in zip(logits, labels, strict=True) if y[k] != -100]
        there = sum(y for _, y in known)
        if not there:
            continue
        area, recall_before = 0.0, 0.0
        for threshold in sorted({z for z, _ in known}, reverse=True):
            taken = [y for z, y in known if z >= threshold]
            area += (sum(taken) / there - recall_before) * sum(taken) / len(taken)
            recall_before = sum(taken) / there
        found.append(area)
    return _mean(found)


def _answers(logits, labels, classes):
    right = wrong = 0
    for row, ys in zip(logits, labels, strict=True):
        for k in classes:
            if ys[k] != -100:
                right += row[k] > 0 and ys[k] == 1
                wrong += (row[k] > 0) != (ys[k] == 1)
    return right, wrong


def micro_f1(logits, labels):
    right, wrong = _answers(logits, labels, range(len(logits[0])))
    return 2 * right / (2 * right + wrong)


def macro_f1(logits, labels):
    each = [_answers(logits, labels, [k]) for k in range(len(logits[0]))]
    return _mean(2 * right / (2 * right + wrong) for right, wrong in each if right + wrong)
