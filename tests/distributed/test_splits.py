"""How the effective batch is split into micro-batches and processes changes nothing."""

import json

import pytest
from safetensors import safe_open

from tests.distributed.split_worker import per_image_objectives, run, work
from tests.support.helpers import forked, largest_difference, launch, pair, weights


@pytest.mark.parametrize("number", [16, 20], ids=["even", "ragged"])
@pytest.mark.parametrize("labels", ["hard", "some", "soft"])
def test_accumulation_equals_one_large_batch(tmp_path, labels, number):
    one = run(tmp_path / "a", 8, 1, labels, number)
    split = run(tmp_path / "b", 2, 4, labels, number)
    assert one.state.global_step == split.state.global_step == -(-number // 8)
    start, _ = pair()
    assert largest_difference(weights(one.model), weights(start)) > 1e-3
    assert largest_difference(weights(one.distiller), weights(split.distiller)) < 1e-6
    for a, b in zip(one.state.log_history[:-1], split.state.log_history[:-1], strict=True):
        for key in one.distiller.weights:
            assert a[key] == pytest.approx(b[key], rel=1e-4)


def _launch(out, processes, per_device, accumulation, labels, way):
    # From here, so that both read one folder of a representation: processes with other settings are refused.
    settings = {"objectives": per_image_objectives(labels, pair()[1])}
    if way == "forked":
        forked(work, processes, out, per_device, accumulation, labels, settings)
    else:
        launch(
            "tests.distributed.split_worker", processes, out, per_device, accumulation, labels, json.dumps(settings)
        )
    with safe_open(out, "pt") as file:
        assert file.metadata()["world"] == str(processes)
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["logged"])  # noqa: SIM118


@pytest.mark.parametrize("way", ["forked", pytest.param("launched", marks=pytest.mark.slow)])
@pytest.mark.parametrize("labels", ["some", "soft"])
def test_two_processes_equal_one(tmp_path, labels, way):
    single = run(tmp_path / "single", 8, 1, labels)
    two, logged = _launch(tmp_path / "two.safetensors", 2, 2, 2, labels, way)
    assert largest_difference(weights(single.distiller), two) < 1e-6
    for a, b in zip(single.state.log_history[:-1], logged[:-1], strict=True):
        for key in single.distiller.weights:
            assert a[key] == pytest.approx(b[key], rel=1e-4)
