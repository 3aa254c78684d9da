"""The options under which every law is tried. An objective that is not listed is tried with its defaults."""

import pytest

from hf_kdtl.objectives import OBJECTIVES
from tests.objectives import derivative_variants

SLOW = pytest.mark.slow
VARIANTS = derivative_variants.VARIANTS | {
    "task": [{}, {"label_smoothing": 0.1}],
    "logit_kd": [
        {},
        {"temperature": 1.0},
        {"direction": "reverse"},
        {"direction": "jsd", "beta": 0.3},
        {"standardize": True},
        {"hard": True},
    ],
    "decoupled_kd": [{}, {"temperature": 4.0, "beta": 2.0}, {"alpha": 0.0}, {"beta": 0}],
    "dist": [{}, {"temperature": 4.0, "beta": 2.0}, {"beta": 0}, {"gamma": 0.0}],
    "attention_map": [
        {},
        {"rows": "all"},
        {"distance": "mse", "layers": "last"},
        {"heads": "relation", "rows": "all"},
        {"heads": "relation", "relation_heads": 4},
    ],
    "attention_transfer": [{}, {"mode": "paper"}, {"layers": [[0, 0], [1, 1]]}],
    "hidden_states": [
        {},
        {"projector": "identity"},
        {"projector": "orthogonal", "distance": "cosine"},
        {"normalize": "none", "projector": "identity", "distance": "smooth_l1"},
        {"normalize": "teacher", "layers": "last"},
    ],
    "relation": [{}, {"heads": 4}],
    "feature_kd": [
        {},
        {"projector": "identity", "standardize": "none"},
        {"projector": "identity", "standardize": "channel", "patch_weight": 0.3},
        {"projector": "linear", "standardize": "none", "patch_weight": 0},
    ],
    "similarity": [
        {},
        {"projector": "identity", "temperature": 0.5},
        {"projector": "linear", "bank": 8, "local_weight": 0},
    ],
    "lwf": [{}, {"source": "start", "temperature": 1.0}, {"freeze_head": True}],
    "l2_sp": [{}, {"head_weight": 0.1}],
    "delta": [{}, {"layers": "last"}, {"layers": [0]}],
    "bss": [{}, {"k": 2}],
    # A word for a representation that is made up for the teacher at hand (tests/support/representations.py).
    "bregman": [
        {"representation": "probabilities"},
        {"representation": "pooled"},
        {"representation": "hidden_states"},
        {"representation": "attention"},
        {"representation": "probabilities", "coefficients": 0.5},
    ],
}


def _cases(variants, fast=None):
    return [
        pytest.param(name, options, id=_id(name, options), marks=() if fast is None or options in fast[name] else SLOW)
        for name in OBJECTIVES
        for options in variants.get(name, [{}])
    ]


def _id(name, options):
    if name in derivative_variants.VARIANTS:
        return derivative_variants.short(name, options)
    return f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}"


CASES = _cases(VARIANTS)
EVERY = {name: derivative_variants.EVERY.get(name, []) for name in OBJECTIVES}
FURTHER = _cases(EVERY, fast={name: derivative_variants.pairwise(options) for name, options in EVERY.items()})
