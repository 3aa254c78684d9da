"""The two gradients of a step: gathered over micro-batches and processes, and made one."""

import gc
import json
import math
import threading

import pytest
import torch

from hf_kdtl.functional import surgery
from tests.gradient_rules.small import Small
from tests.reference.surgery import layer_local

RULES = {
    "one_sided": {"rule": "never_hurt"},
    "tensor": {"rule": "never_hurt", "scope": "tensor"},
    "orthogonal": {"rule": "never_hurt", "form": "orthogonal", "alpha": 0.5},
    "pcgrad": {"rule": "pcgrad"},
    "layer_local": {"rule": "layer_local"},
}
every_rule = pytest.mark.parametrize("rule", RULES)


def step(small, rule, micro_batches, reduce=None, watch=False):
    """The window of one optimizer step; micro-batches are the keywords of `Small.terms`."""
    window = small.window(**RULES[rule])
    window.watch = watch
    for terms in micro_batches:
        window.add(*small.terms(**terms), small.pairs)
        assert all(g is None for g in small.gradients())
    window.write(1, reduce)
    return window


def options(rule):
    # A local rule has no use for a term without layers.
    return {"wrong": 0.0, "features": 0.01} if rule == "layer_local" else {"wrong": 1.0, "features": 1e-4}


def assert_same(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- Micro-batches and processes ----


@every_rule
def test_micro_batches_equal_one(rule):
    full, split = Small(torch.float64), Small(torch.float64)
    step(full, rule, [options(rule)])
    step(split, rule, [{"rows": slice(0, 1)} | options(rule), {"rows": slice(1, 6)} | options(rule)])
    assert_same(split.gradients(), full.gradients())
    # The rule saw all of the window: a rule for each micro-batch, and then the sum, is something else.
    apart = [torch.zeros_like(p) for _, p in full.parameters]
    for rows in (slice(0, 1), slice(1, 6)):
        step(split, rule, [{"rows": rows} | options(rule)])
        apart = [a if g is None else a + g for a, g in zip(apart, split.gradients(), strict=True)]
    distance = max((a - g).abs().max().item() for a, g in zip(apart, full.gradients(), strict=True) if g is not None)
    assert (distance > 1e-6) == (rule != "layer_local")


class Ranks:
    """Processes as threads: their mean, where all must ask for the same tensors in the same order."""

    def __init__(self, number=2):
        self.barrier, self.given = threading.Barrier(number, timeout=20), [None] * number

    def reduce(self, rank):
        def mean(tensor):
            self.given[rank] = tensor.clone()
            self.barrier.wait()
            assert len({g.shape for g in self.given}) == 1
            result = torch.stack(self.given).mean(0)
            self.barrier.wait()
            tensor.copy_(result)

        return mean

    def run(self, rule, parts):
        """One rank a list of micro-batches, each with its own copy of the model; their models."""
        smalls, broken = [Small(torch.float64) for _ in parts], []

        def one(rank):
            try:
                torch.set_num_threads(1)
                step(smalls[rank], rule, parts[rank], self.reduce(rank))
            except BaseException as error:
                broken.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not broken, broken
        return smalls


def scaled(terms):
    """A mean over two ranks: each gives double."""
    return {"times": 2.0} | terms


@every_rule
def test_two_processes_equal_one(rule):
    full = Small(torch.float64)
    step(full, rule, [options(rule)])
    halves = [[scaled({"rows": rows} | options(rule))] for rows in (slice(0, 2), slice(2, 6))]
    for small in Ranks().run(rule, halves):
        assert_same(small.gradients(), full.gradients())


@every_rule
@pytest.mark.parametrize("absent", ["transfer", "task"])
def test_a_term_that_one_process_does_not_have(rule, absent):
    def without(small):
        task, transfer = small.terms(**options(rule))
        return (None, transfer) if absent == "task" else (task, {})

    full = Small(torch.float64)
    window = full.window(**RULES[rule])
    for task, transfer in (full.terms(**options(rule)), without(full)):
        window.add(task, transfer, full.pairs)
    window.write(1)
    lone = [[scaled(options(rule))], [scaled({"without": absent} | options(rule))]]
    for small in Ranks().run(rule, lone):
        assert_same(small.gradients(), full.gradients())


def test_processes_exchange_only_what_one_of_them_has():
    small, seen = Small(), []
    step(small, "one_sided", [{"wrong": 0.0, "features": 0.1}], seen.append)
    d = [g for g in small.sides(wrong=0.0, features=0.1)[1] if g is not None]
    g = [g for g in small.sides()[0] if g is not None]
    assert seen[0].shape == (2, len(small.parameters)) and len(seen) == 1 + len(g) + len(d)
    assert len(d) < len(small.parameters)  # nothing behind the last block


# ---- What a window holds ----


@pytest.fixture
def alive():
    """The bytes of all tensors made since."""
    gc.collect()
    gc.freeze()  # the thousands of objects that were there before are not looked through

    def count():
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
        return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())

    yield count
    gc.unfreeze()


@pytest.mark.parametrize("watch", [False, True])
def test_memory_is_two_sets_of_gradients(alive, watch):
    small = Small()
    window, one = small.window(), small.bytes()
    window.watch = watch
    projector = small.projector.weight.numel() * 4  # only the transfer has it
    before = alive()
    window.add(*small.terms(features=1e-4), small.pairs)
    small.hidden = None
    assert alive() - before == 2 * one - projector
    window.add(*small.terms(features=1e-4), small.pairs)
    small.hidden = None
    assert alive() - before == 2 * one - projector
    window.write(0)
    assert alive() - before == (2 * one - projector if watch else one)
    window.before_step()
    window.after_step()
    assert alive() - before == one


@pytest.mark.parametrize("watch", [False, True])
def test_gradients_are_added_and_made_one_in_place(watch):
    small = Small()
    window = small.window()
    window.watch = watch
    places = []
    for _ in range(2):
        window.add(*small.terms(features=1e-4), small.pairs)
        places.append([None if g is None else g.data_ptr() for g in (*window._task, *window._transfer)])
    assert places[0] == places[1]
    window.write(0)
    written = [p.grad.data_ptr() for _, p in small.parameters]
    assert written == places[0][len(written) :]


@pytest.mark.parametrize("watch", [False, True])
def test_windows_do_not_leak_into_one_another(watch):
    small = Small()
    window = small.window()
    window.watch = watch
    window.add(*small.terms(), small.pairs)
    window.write(0)
    first = [None if g is None else g.clone() for g in small.gradients()]
    window.after_step()
    window.add(*small.terms(), small.pairs)  # a window that is broken off
    window.clear()
    window.add(*small.terms(), small.pairs)
    window.write(0)
    assert_same(small.gradients(), first, 0.0)


def test_graphs_that_share_nothing_and_terms_without_a_gradient():
    small = Small()
    g = small.sides()[0]
    window = small.window()
    window.add(small.terms()[0], {"constant": torch.tensor(3.0)}, {})  # a fraction that chose no image
    window.write(0)
    assert_same(small.gradients(), g, 0.0)
    window.add(small.terms()[0].detach(), {}, {})
    window.write(0)
    assert all(p is None for p in small.gradients())
    assert window.log(1) == {
        "gradient_rule/cosine": 0.0,
        "gradient_rule/conflicting": 0.0,
        "gradient_rule/removed": 0.0,
    }


@every_rule
@pytest.mark.parametrize("task", [None, 0.0])
def test_without_a_task_gradient_it_is_the_transfers(rule, task):
    small = Small()
    loss, transfer = small.terms(**options(rule))
    if rule != "layer_local":
        d = small.sides(**options(rule))[1]
    else:
        d = list(layer_local(loss * 0, {"features": list(enumerate(transfer["features"]))}, small.blocks, small.own,
                             small.parameters).values())  # fmt: skip
    window = small.window(**RULES[rule])
    window.add(task if task is None else loss * task, transfer, small.pairs)
    window.write(0)
    for got, want in zip(small.gradients(), d, strict=True):
        assert torch.equal(torch.zeros_like(want) if got is None else got, want)
    assert window.log(1)["gradient_rule/cosine"] == 0.0


@pytest.mark.parametrize("side", ["task", "transfer"])
def test_nan_goes_through_and_shows(side):
    small = Small()
    task, transfer = small.terms()
    window = small.window()
    window.add(task * (math.nan if side == "task" else 1), {"wrong": transfer["wrong"] * (math.nan if side == "transfer" else 1)}, {})  # fmt: skip  # noqa: E501
    window.write(0)
    assert all(g is None or g.isnan().all() for g in small.gradients())
    assert math.isnan(window.log(1)["gradient_rule/cosine"])
    json.dumps(window.state_dict(), allow_nan=False)


def test_a_device_without_float64_computes_on_the_cpu(monkeypatch):
    small, fixed = Small(), Small()
    step(small, "one_sided", [options("one_sided")])
    moved, original = [], torch.Tensor.cpu
    monkeypatch.setattr(surgery, "_NO_FLOAT64", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (moved.append(x.dtype), original(x))[1])
    window = step(fixed, "one_sided", [options("one_sided")], watch=True)
    assert_same(fixed.gradients(), small.gradients(), 0.0)
    moved.clear()
    window.before_step()
    window.after_step()
    assert set(moved) == {torch.float32} and window.log(1)["gradient_rule/task_step"] == 0.0


def test_checkpointed_blocks():
    small, plain = Small(), Small()
    step(plain, "one_sided", [options("one_sided")])
    small.student.gradient_checkpointing_enable({"use_reentrant": False})
    small.student.train()  # its dropout is 0
    step(small, "one_sided", [options("one_sided")])
    assert_same(small.gradients(), plain.gradients(), 1e-6)
