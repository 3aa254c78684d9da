import json
import time

import pytest
import torch
from torch import nn

from hf_kdtl.evaluation import cost as module
from hf_kdtl.evaluation.cost import (
    cost,
    file_size,
    flops,
    images_per_second,
    latency,
    parameters,
    peak_memory,
)
from hf_kdtl.models.measure import WARM_UP
from tests.support.tiny import build


class Net(nn.Sequential):
    """Layers that are called as transformers' models are."""

    def forward(self, pixel_values):
        return super().forward(pixel_values)


class Clocked(nn.Module):
    """Whose forwards take the seconds of a list, by a clock that it moves; it writes down who was called."""

    def __init__(self, name, seconds, log):
        super().__init__()
        self.name, self.seconds, self.log = name, list(seconds), log

    def forward(self, pixel_values):
        self.log.append((self.name, len(pixel_values), self.training, torch.is_grad_enabled()))
        self.log.now += self.seconds.pop(0)


class Log(list):
    now = 0.0


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr(time, "perf_counter", lambda: log.now)
    return log


def test_parameters_count_shared_ones_once():
    layer = nn.Linear(3, 2)
    assert parameters(nn.Sequential(layer, layer)) == 8


def test_timing_restores_the_mode_of_every_module():
    model = build("vit", layers=2).train()
    model.vit.layers[0].eval()
    other = build("vit", layers=1)
    pixels = torch.randn(2, 3, 32, 32)
    speed = images_per_second({"one": (model, pixels), "other": (other, pixels)}, repeats=1)
    assert list(speed) == ["one", "other"] and all(0 < value < float("inf") for value in speed.values())
    assert model.training and not model.vit.layers[0].training and model.vit.layers[1].training and not other.training


# ---- arithmetic ----


@pytest.mark.parametrize(("image_size", "layers", "attention"), [(32, 2, "sdpa"), (48, 3, "sdpa"), (32, 2, "eager")])
def test_flops_of_a_vit_by_hand(image_size, layers, attention):
    model = build("vit", image_size=image_size, layers=layers, attn_implementation=attention).train()
    channels, patch, width, inner, classes = 3, 8, 32, 64, 3
    patches = (image_size // patch) ** 2
    tokens = patches + 1  # the class token
    embedding = 2 * patches * width * channels * patch**2
    query_key_value_output = 4 * 2 * tokens * width * width
    scores_and_sum = 2 * 2 * tokens**2 * width
    mlp = 2 * 2 * tokens * width * inner
    expected = embedding + layers * (query_key_value_output + scores_and_sum + mlp) + 2 * width * classes
    assert flops(model, torch.randn(4, 3, image_size, image_size)) == expected  # of one image, whatever the batch
    assert model.training


def test_flops_of_convolutions_by_hand():
    net = Net(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4))
    dense, grouped = 2 * 16 * 16 * 8 * 3 * 9, 2 * 8 * 8 * 16 * (8 // 4) * 9
    assert flops(net, torch.randn(2, 3, 16, 16)) == dense + grouped
    assert torch.equal(net[1].running_mean, torch.zeros(8))  # eval mode: no statistics were taken


# ---- time ----


def test_latency_is_the_median_and_the_95th_percentile_after_the_warm_up(log):
    slow = [100.0] * WARM_UP
    first = Clocked("first", [*slow, 0.004, 0.001, 0.002, 0.003, 0.005], log)
    second = Clocked("second", [*slow, *[1.0] * 5], log)
    pixels = torch.zeros(4, 3, 2, 2)
    found = latency({"first": (first, pixels), "second": (second, pixels)}, repeats=5)
    # Sorted 1 to 5 ms: the 95th percentile lies 0.8 of the way from the fourth to the fifth.
    assert found["first"] == pytest.approx({"median": 3.0, "p95": 4.8})
    assert found["second"] == pytest.approx({"median": 1000.0, "p95": 1000.0})
    turns = [("first", 4, False, False), ("second", 4, False, False)]
    assert log == turns * (WARM_UP + 5)


def test_images_per_second_is_of_the_median(log):
    models = {
        name: (Clocked(name, [100.0] * WARM_UP + seconds, log), torch.zeros(8, 1))
        for name, seconds in (("fast", [0.5, 0.1, 0.2]), ("slow", [0.4, 0.6, 3.0]))
    }
    assert images_per_second(models, repeats=3) == pytest.approx({"fast": 8 / 0.2, "slow": 8 / 0.6})


# ---- memory and disk ----


def test_peak_memory_of_a_known_net():
    net, pixels = Net(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(100, 64)
    weights = 64 * 256 + 256 + 256 * 64 + 64
    # The most is held at the ReLU: its input and its output. Twice, since nothing may be left from the first time.
    for _ in range(2):
        assert peak_memory(net, pixels) == 4 * (weights + 100 * 64 + 2 * 100 * 256)


def test_peak_memory_sees_what_was_given_back_and_shared_weights_once():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.other = nn.Parameter(torch.ones(1))
            self.register_buffer("offset", torch.zeros(3))

        def forward(self, pixel_values):
            wide = torch.cat([pixel_values] * 50)
            del wide
            return pixel_values * self.one

    assert peak_memory(Wide(), torch.ones(10, 10)) == 4 * (1 + 3 + 100 + 50 * 100)


def test_file_size_is_that_of_the_saved_model(tmp_path):
    model = build("vit")
    model.save_pretrained(tmp_path)
    header = 100 * len(model.state_dict())  # names, shapes and offsets
    assert file_size(model) == pytest.approx((tmp_path / "model.safetensors").stat().st_size, abs=header)
    assert 0 < file_size(model) - 4 * parameters(model) < 2 * header


def test_file_size_counts_tied_weights_once():
    layer = nn.Linear(500, 500, bias=False)
    assert file_size(nn.Sequential(layer, layer)) == pytest.approx(4 * 500 * 500, abs=300)


# ---- all of it ----


def test_cost_is_ready_for_results_json():
    models = {
        "vit": (build("vit").train(), torch.randn(4, 3, 32, 32)),
        "resnet": (build("resnet"), torch.randn(1, 3, 32, 32)),
    }
    found = cost(models, repeats=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, (model, pixels) in models.items():
        one = found[name]
        assert one["parameters"] == parameters(model) and one["flops"] == flops(model, pixels)
        assert one["peak_memory_bytes"] == peak_memory(model, pixels) and one["file_bytes"] == file_size(model)
        assert (one["batch_size"], one["dtype"]) == (len(pixels), "float32") and "CPU" in one["device"]
        assert list(one["latency_ms"]) == list(dict.fromkeys(["1", str(len(pixels))]))
        assert all(0 < times["median"] <= times["p95"] for times in one["latency_ms"].values())
        median = one["latency_ms"][str(len(pixels))]["median"]
        assert one["images_per_second"] == pytest.approx(1000 * len(pixels) / median)
    assert models["vit"][0].training


def test_cost_measures_a_batch_of_one_and_the_full_batch(log, monkeypatch):
    for name in ("flops", "peak_memory"):
        monkeypatch.setattr(module, name, lambda *_: 0)
    model = Clocked("one", [0.0] * WARM_UP + [0.001] + [0.0] * WARM_UP + [0.006], log)
    found = cost({"one": (model, torch.zeros(3, 1))}, repeats=1)["one"]
    assert [size for _, size, *_ in log] == [1] * (WARM_UP + 1) + [3] * (WARM_UP + 1)
    assert {size: times["median"] for size, times in found["latency_ms"].items()} == pytest.approx({"1": 1, "3": 6})
    assert found["images_per_second"] == pytest.approx(500)


@pytest.mark.parametrize(
    ("images", "repeats", "message"),
    [(0, 2, r"net has pixel_values \(0, 64\); expected one image"), (2, 0, "repeats is 0, expected 1 or more")],
)
def test_bad_input(images, repeats, message):
    with pytest.raises(ValueError, match=message):
        cost({"net": (Net(nn.Linear(64, 8)), torch.zeros(images, 64))}, repeats)


def test_modes_are_put_back_after_an_error():
    net = Net(nn.Linear(64, 8)).train()
    with pytest.raises(RuntimeError):
        flops(net, torch.zeros(2, 3))
    assert net.training and torch.is_grad_enabled()
