"""Checks of settings: what is refused, and in which words."""

import doctest

import pytest

from hf_kdtl.utils import options
from hf_kdtl.utils.options import check_known, check_option, is_integer, is_number


def test_examples_in_docstrings_hold():
    found = doctest.testmod(options)
    assert found.attempted >= 2 and not found.failed


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tempreature", r"^unknown option: 'tempreature'. Did you mean 'temperature'\? Valid: temperature, beta.$"),
        ("zzz", r"^unknown option: 'zzz'. Valid: temperature, beta.$"),
        (["beta"], r"^unknown option: \['beta'\]."),  # not hashable, as YAML may give it
    ],
)
def test_unknown_names_are_refused_with_the_closest(name, says):
    with pytest.raises(ValueError, match=says):
        check_known("option", name, {"temperature": 1, "beta": 2})
    check_known("option", "beta", {"temperature": 1, "beta": 2})


def test_nothing_valid_is_reported():
    with pytest.raises(ValueError, match="none in this version"):
        check_known("thing", "x", [])


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"^layer_rates: decay is 2; expected a number in \(0, 1\].$"):
        check_option("layer_rates", "decay", 2, False, "a number in (0, 1]")
    check_option("layer_rates", "decay", 0.5, True, "a number in (0, 1]")


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), -float("inf"), 1e39, 10**400, [1]])
def test_no_number(value):
    assert not is_number(value) and not is_integer(value if value != 10**400 else True)


@pytest.mark.parametrize("value", [0, -3, 0.5, 3.4e38])
def test_a_number(value):
    assert is_number(value)


def test_whole_numbers():
    assert is_integer(1) and is_integer(4, 4) and is_integer(0, 0)
    assert not is_integer(0) and not is_integer(3, 4) and not is_integer(1.0)
