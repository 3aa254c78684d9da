"""Objectives under FSDP2, on two processes: exact where they are allowed, refused where they would be wrong."""

import json

import pytest
from safetensors import safe_open

from tests.distributed.fsdp_worker import IMAGES, WAYS, gradient
from tests.support.helpers import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp") / "out.safetensors"
    launch("tests.distributed.fsdp_worker", 2, out)
    with safe_open(out, "pt") as file:
        assert file.metadata()["world"] == "2"
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("way", WAYS)
def test_sharded_gradients_equal_one_process(sharded, way):
    _, found = sharded
    if way == "rounded":  # an activation's range is that of the images of a process
        one, two = (gradient(way, list(rows)) for rows in (range(IMAGES // 2), range(IMAGES // 2, IMAGES)))
        expected = {name: g + two[name] for name, g in one.items()}
    else:
        expected = gradient(way, list(range(IMAGES)))
    assert max(g.abs().max() for g in expected.values()) > 1e-4
    for name, g in expected.items():
        # A parameter whose shard got no gradient has None there and 0 here: the touch of an unused classifier.
        got = found.get(f"{way}/{name}")
        assert got is not None, name
        assert (got - g).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("vjp", "under FSDP2 a double backward gives zero gradients, silently; use estimator='split'"),
        ("hessian, by the teacher", "under FSDP2 a double backward gives zero gradients, silently; use what="),
        ("l2_sp", "under FSDP2 each process holds a part of every weight, and l2_sp compares full ones"),
        ("rule", "a gradient_rule compares full gradients, and FSDP2 leaves each process a shard"),
    ],
)
def test_what_would_be_wrong_is_refused(sharded, what, says):
    assert says in json.loads(sharded[0]["refused"])[what]
