"""Which student of several seeds is kept."""

from hf_kdtl.commands.common.scores import best_seed


def scores(accuracy, nll, test=0.5):
    return {"validation": {"accuracy": accuracy, "nll": nll}, "test": {"accuracy": test, "nll": 1.0}}


def test_the_best_seed_is_that_of_validation_and_of_equals_the_one_with_the_lower_nll():
    assert best_seed({"1": scores(0.6, 0.9, test=0.9), "7": scores(0.8, 0.9), "9": scores(0.7, 0.1)}) == 7
    assert best_seed({"1": scores(0.8, 0.9), "7": scores(0.8, 0.5), "9": scores(0.8, 0.5)}) == 7
