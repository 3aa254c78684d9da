"""The derivative objectives' options: those under which every law is tried, and every valid combination.

VARIANTS goes through all laws, EVERY only through value and gradient against the reference: in the fast suite those
that have each pair of settings, in the slow one all.
"""

from itertools import combinations, product

OF = (None, "logprob", "centred")
OUTPUTS = ("teacher_top1", "label")
DIFFERENCE = {"estimator": "finite_difference", "step": 0.05}
CENTRAL = {"estimator": "split", "central": True, "step": 1e-4}
ESTIMATORS = {
    "normalized": [{"estimator": "vjp"}, {"estimator": "split"}],
    "squared": [{"estimator": "vjp"}, {"estimator": "split"}, DIFFERENCE, DIFFERENCE | {"central": True}],
    "projection": [{"estimator": "vjp"}, {"estimator": "split"}],
    "all": [{"estimator": "vjp"}, DIFFERENCE, DIFFERENCE | {"central": True}],
}


def given(**options):
    """Without those that are None."""
    return {k: v for k, v in options.items() if v is not None}


JACOBIAN = [
    *(
        given(distance=d, output=o, of=q) | e
        for d in ("normalized", "squared")
        for o, q, e in product(OUTPUTS, OF, ESTIMATORS[d])
    ),
    *(
        given(distance="squared", output=o, of=q) | e
        for o in ("projection", "all")
        for q, e in product(OF, ESTIMATORS[o])
    ),
    *(given(distance=d, output="all") | e for d, e in product(("fisher", "softmax"), ESTIMATORS["all"])),
    CENTRAL,
    {"distance": "squared", "output": "label", "of": "logprob", "probes": 1} | CENTRAL,
    {"distance": "squared", "output": "projection", "probes": 3},
    {"distance": "squared", "output": "label", "probes": 3} | DIFFERENCE,
    {"distance": "fisher", "output": "all", "probes": 2, "fraction": 0.5} | DIFFERENCE,
    *({"of": "embedding", "distance": d} | e for d in ("normalized", "squared") for e in ESTIMATORS["projection"]),
    {"of": "embedding", "projector": "linear"} | CENTRAL,
]
EVERY = {
    "jacobian": JACOBIAN,
    "jacobian_norm": [
        *(given(of=q) | e for q, e in product(("logit", None, "centred"), ESTIMATORS["squared"])),
        CENTRAL,
        {"probes": 3} | DIFFERENCE,
    ],
    "attention_jacobian": [
        *({"estimator": e, "pool": pool} for e, pool in product(("vjp", "split"), (1, 2))),
        {"estimator": "vjp", "pool": 1, "layers": [[0, 1], [1, 0]]},
        {"pool": 1, "layers": [[0, 1]]} | CENTRAL,
    ],
    "hessian": [
        *(given(distance=d, output=o, of=q) for d, o, q in product((None, "squared"), OUTPUTS, OF)),
        *(
            given(what="curvature", output=o, of=q) | e
            for o, q, e in product(OUTPUTS, OF, ({"estimator": "hvp"}, DIFFERENCE))
        ),
        {"probes": 2},
        {"what": "curvature", "probes": 2} | DIFFERENCE,
    ],
    "noisy_kd": [{}, {"temperature": 1.0, "noise": 0.5, "probes": 2}, {"fraction": 0.5}],
}
VARIANTS = {
    "jacobian": [
        {},
        {"of": "logprob", "output": "label", "estimator": "split"},
        {"of": "centred"} | CENTRAL,
        {"distance": "squared", "fraction": 0.5},
        {"distance": "squared", "output": "label"} | DIFFERENCE,
        {"distance": "squared", "output": "projection", "estimator": "split"},
        {"distance": "squared", "output": "all", "central": True} | DIFFERENCE,
        {"distance": "fisher", "output": "all", "probes": 2},
        {"distance": "fisher", "output": "all", "estimator": "vjp"},
        {"distance": "softmax", "output": "all"},
        {"of": "embedding"},
        {"of": "embedding", "distance": "squared", "estimator": "split", "projector": "identity"},
        {"sketch": 5, "distance": "squared", "fraction": 0.5},
        {"sketch": 5, "of": "centred", "estimator": "split"},
    ],
    "jacobian_norm": [{}, {"of": "centred", "estimator": "split"}, DIFFERENCE],
    "attention_jacobian": [{}, {"pool": 1, "layers": "uniform", "estimator": "split"}],
    "hessian": [
        {},
        {"distance": "squared", "output": "label", "of": "logprob"},
        {"what": "curvature"},
        {"what": "curvature"} | DIFFERENCE,
    ],
    "noisy_kd": [{}, {"probes": 2, "fraction": 0.5}],
}


def pairwise(every):
    """Few of them in which each pair of settings that occurs in any occurs: the next is that with most new pairs."""
    keys = sorted({k for options in every for k in options})
    left = [(options, set(combinations([(k, repr(options.get(k))) for k in keys], 2))) for options in every]
    seen, found = set(), []
    while left and not all(pairs <= seen for _, pairs in left):
        options, pairs = max(left, key=lambda one: len(one[1] - seen))
        seen |= pairs
        found.append(options)
    return found


def takes_differences(options):
    """Whether values at two places are subtracted, which weights of 16 bits do not allow."""
    all_classes = options.get("output") == "all" and options.get("estimator", "auto") == "auto"
    return all_classes or options.get("estimator") == "finite_difference" or options.get("central", False)


def short(name, options):
    """An id such as jacobian-squared-label-split-central."""
    words = {True: "central", "finite_difference": "fd", "teacher_top1": "top1"}
    parts = []
    for key, value in options.items():
        if key in ("step", "temperature"):
            continue
        named = key in ("sketch", "probes", "fraction", "noise", "pool", "layers")
        parts.append(f"{key}{value}" if named else str(words.get(value, value)))
    return "-".join([name, *parts]).replace(" ", "") if parts else f"{name}-default"
