"""The options under which every law is tried. An objective that is not listed is tried with its defaults."""

import pytest

from hf_kdtl.objectives import OBJECTIVES

VARIANTS = {
    "task": [{}, {"label_smoothing": 0.1}],
    "logit_kd": [
        {},
        {"temperature": 1.0},
        {"direction": "reverse"},
        {"direction": "jsd", "beta": 0.3},
        {"standardize": True},
        {"hard": True},
    ],
}
CASES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}")
    for name in OBJECTIVES
    for options in VARIANTS.get(name, [{}])
]
