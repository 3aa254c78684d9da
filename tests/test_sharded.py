"""Derivatives under FSDP2, on two processes: exact where they are allowed, refused where they would be zero."""

import pytest
from safetensors import safe_open

from tests.fsdp_worker import IMAGES, WAYS, gradient
from tests.helpers import torchrun


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp") / "out.safetensors"
    torchrun("tests.fsdp_worker", 2, out)
    with safe_open(out, "pt") as file:
        assert file.metadata()["world"] == "2"
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("way", WAYS)
def test_sharded_gradients_equal_one_process(sharded, way):
    _, found = sharded
    expected = gradient(way, list(range(IMAGES)))
    assert max(g.abs().max() for g in expected.values()) > 1e-4
    for name, g in expected.items():
        # A parameter whose shard got no gradient has None there and 0 here: the touch of an unused classifier.
        got = found.get(f"{way}/{name}")
        assert got is not None, name
        assert (got - g).abs().max() < 1e-6, name


def test_double_backward_is_refused(sharded):
    said = sharded[0]["refused"]
    assert "under FSDP2 a double backward gives zero gradients, silently; use estimator='split'" in said
