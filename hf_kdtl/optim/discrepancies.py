"""From two models and a micro-batch to what the discrepancies are made of, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_kdtl.functional.attention import align_columns, attention_rows, mean_heads
from hf_kdtl.functional.discrepancy import (
    discrepancy,
    distribution,
    input_curvature_energies,
    input_gradient_energy,
    output_energy,
    parameter_curvature,
    parameter_gradient_energy,
)
from hf_kdtl.functional.features import energy
from hf_kdtl.functional.random import Draws
from hf_kdtl.functional.resample import Grid, redistribute
from hf_kdtl.models.adapters import plain_names
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.attention_hooks import Attention, run
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.geometry import LayerGeometry
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.pairing import Pair, PairingPlan
from hf_kdtl.models.teachers.teacher import Teacher
from hf_kdtl.optim.options import RateOptions


class Call(NamedTuple):
    """A block and what it was called with."""

    block: nn.Module
    args: tuple
    kwargs: dict[str, Any]


def check_pairs(options: RateOptions, pairs: Sequence[Pair]) -> None:
    """Refuse pairs that the source cannot compare.

    Raises:
        ValueError: saying which, why, and what to type instead.
    """
    if options.source != "attention" and options.wrt == "parameters":
        return
    for pair in pairs:
        problem = _problem(options, pair)
        if problem:
            raise ValueError(
                f"layer_rates: {pair}: {problem}. Name other layers, such as layers=[[0, 1], [1, 3]], or take "
                "source='jacobian' with wrt='parameters', which compares any two blocks."
            )


def _problem(options: RateOptions, pair: Pair) -> str:
    by_row = options.source == "attention" and options.map == "class"
    if pair.student.grid == (1, 1):
        return "the student's patches are a single cell, which has no distribution"
    for who, layer in (("student", pair.student), ("teacher", pair.teacher)):
        if layer.grid is None and not (who == "teacher" and options.source != "attention"):
            return f"the {who}'s tokens are on no known grid"
        if by_row and ("class" not in layer.prefix or layer.attention != "full"):
            return f"map='class' needs a class token that attends to every patch, and the {who}'s block has none"
    return ""


def needs(options: RateOptions, pairs: Sequence[Pair]) -> tuple[Needs, Needs]:
    """What the attention source reads of (student, teacher)."""
    blocks = [frozenset(getattr(p, f"{who}_layer") for p in pairs) for who in ("student", "teacher")]
    if options.map == "class":
        return Needs(attention=blocks[0]), Needs(attention=blocks[1])
    return Needs(hidden_states=blocks[0]), Needs(hidden_states=blocks[1])


@torch.no_grad()
def attention_discrepancies(options: RateOptions, pairs: Sequence[Pair], student: Capture, teacher: Capture) -> Tensor:
    """D of every image and pair, (B, pairs) nats: JSD of the maps over the student's patches.

    `map` energy: mean_d h^2 of each patch. class: the class token's attention to the patches, mean over heads, what it
    gives to other tokens left out. The teacher's map is brought to the student's grid with its sums kept.
    """
    found = []
    for pair in (pair.at(student.geometry, teacher.geometry) for pair in pairs):
        p = _map(options, student, pair.student_layer, pair.student, _grid(pair.student))
        q = _map(options, teacher, pair.teacher_layer, pair.teacher, _grid(pair.student))
        found.append(discrepancy(distribution(p), distribution(q)))
    return torch.stack(found, 1)


def _map(options: RateOptions, captured: Capture, layer: int, geometry: LayerGeometry, grid: Grid) -> Tensor:
    if options.map == "class":
        return _class_row(captured.attention[layer], geometry, grid)
    hidden = captured.hidden_states[layer]
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    return redistribute(energy(tokens[:, len(geometry.prefix) :]), _grid(geometry), grid)


def _class_row(a: Attention, geometry: LayerGeometry, grid: Grid) -> Tensor:
    row = geometry.prefix.index("class")
    if a.weights is not None:
        log_p = a.weights[:, :, row : row + 1].log()
    else:
        assert a.query is not None and a.key is not None
        bias = None if a.bias is None else a.bias[..., row : row + 1, :].expand(*a.bias.shape[:-2], 1, -1)
        log_p = attention_rows(a.query[:, :, row : row + 1], a.key, a.scale, bias)
    return align_columns(mean_heads(log_p), (), len(geometry.prefix), _grid(geometry), grid).exp()[:, 0, 0]


def input_discrepancies(
    options: RateOptions,
    pairs: Sequence[Pair],
    plan: PairingPlan,
    student: nn.Module,
    teacher: Teacher,
    x: Tensor,
    draws: Draws,
) -> Tensor:
    """D of every image and pair, (B, pairs) nats, of derivatives by the student's pixels x (B, C, h, w).

    Both derivatives are by the student's x: what the teacher does to its pixels first is part of it. Source hessian
    takes every second image of the whole batch, to stay within its cost.
    """
    if options.source == "hessian":
        x = x[[i for i, position in enumerate(draws.positions) if position % 2 == 0]]
        draws = Draws(draws.seed, draws.step, tuple(p for p in draws.positions if p % 2 == 0))
        if not len(x):
            return x.new_zeros(0, len(pairs), dtype=torch.float64)
    sides = []
    for who, model in (("student_layer", student), ("teacher_layer", teacher.model)):
        layers = [getattr(pair, who) for pair in pairs]

        def energies(z: Tensor, layers=layers, model=model, who=who) -> list[Tensor]:
            wanted = Needs(hidden_states=frozenset(layers))
            if who == "student_layer":  # which may be the teacher's own model, with adapters
                captured = capture(model, z, wanted, plan.student)
            else:
                captured = teacher(z, wanted, plan.teacher)
            return [output_energy(captured.hidden_states[layer]) for layer in layers]

        answers = teacher.eval_context() if who == "teacher_layer" else nullcontext()
        with torch.enable_grad(), evaluating(model), answers:
            found = _input_energies(options, energies, x, [_grid(pair.student) for pair in pairs], draws)
        sides.append([distribution(e) for e in found])
    return torch.stack([discrepancy(p, q) for p, q in zip(*sides, strict=True)], 1)


def _input_energies(
    options: RateOptions, energies: Callable[[Tensor], list[Tensor]], x: Tensor, grids: Sequence[Grid], draws: Draws
) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    if options.source == "jacobian":
        return [input_gradient_energy(e, x, grid) for e, grid in zip(energies(x), grids, strict=True)]
    # The same directions for both models and all layers.
    probes = []
    for probe in range(options.probes):
        v = draws.rademacher(tuple(x.shape[1:]), f"layer_rates/{probe}", x)
        probes.append(input_curvature_energies(energies, x, grids, v))
    return [torch.stack(of_pair).mean(0) for of_pair in zip(*probes, strict=True)]


def parameter_energies(
    options: RateOptions, pairs: Sequence[Pair], student: nn.Module, teacher: Teacher, x: Tensor, draws: Draws
) -> Tensor:
    """(B, pairs, 2) energies of student and teacher by the blocks' own parameters, each block's input held fixed."""
    sides = []
    for who, model, pixels in (("student_layer", student, x), ("teacher_layer", teacher.model, teacher.pixels(x))):
        layers = [getattr(pair, who) for pair in pairs]
        answers = teacher.eval_context() if who == "teacher_layer" else nullcontext()
        with evaluating(model), answers, _block_inputs(model, layers) as calls:
            with torch.no_grad():
                run(model, pixels)
            found = []
            for place, layer in enumerate(layers):
                found.append(_block_energy(options, place, calls[layer], len(pixels), draws))
        sides.append(torch.stack(found, 1))
    return torch.stack(sides, 2)


def _block_energy(options: RateOptions, place: int, call: Call, images: int, draws: Draws) -> Tensor:
    block, args, kwargs = call
    parameters = {n: p.detach() for n, p in block.named_parameters() if p.dtype.is_floating_point}
    # Both models by the same weights: adapters are part of the function, and only one of them may have any.
    called = plain_names(block, parameters)
    parameters = {name: parameters[name] for name in called}
    inputs, function = _as_function(block, args, kwargs, images)
    if options.source == "jacobian":
        return parameter_gradient_energy(function, parameters, inputs).double()
    total = torch.zeros(images, dtype=torch.float64, device=inputs[0].device)
    # One direction for all images of the batch, on every rank; of the same name and shape in both models, the same.
    shared = Draws(draws.seed, draws.step, (0,))
    for probe in range(options.probes):
        v = {
            name: shared.rademacher(tuple(p.shape), f"layer_rates/{place}/{probe}/{called[name]}", p)[0]
            for name, p in parameters.items()
        }
        total += parameter_curvature(function, parameters, inputs, v).double() / options.probes
    return total


def _as_function(
    block: nn.Module, args: tuple, kwargs: dict, images: int
) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """The inputs that have a row for each image, and the block as a function of its parameters and of them."""
    places: list[Any] = [i for i, x in enumerate(args) if _rows(x, images)]
    names = [name for name, x in kwargs.items() if _rows(x, images)]

    def function(parameters: dict[str, Tensor], *rows: Tensor) -> Tensor:
        own, named = list(args), dict(kwargs)
        for place, x in zip([*places, *names], rows, strict=True):
            holder: Any = own if isinstance(place, int) else named
            holder[place] = x
        output = functional_call(block, parameters, tuple(own), named)
        return output[0] if isinstance(output, tuple) else output

    return (*(args[i] for i in places), *(kwargs[name] for name in names)), function


def _rows(x: Any, images: int) -> bool:
    return torch.is_tensor(x) and x.ndim >= 3 and x.shape[0] == images


@contextmanager
def _block_inputs(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Call]]:
    """{layer: its first call} of the forward that runs inside this context."""
    calls: dict[int, Call] = {}
    blocks = find_blocks(model)

    def keep(layer: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(layer, Call(module, args, kwargs))

        return hook

    handles = [blocks[i][1].register_forward_pre_hook(keep(i), with_kwargs=True) for i in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _grid(layer: LayerGeometry) -> Grid:
    assert layer.grid is not None  # check_pairs
    return layer.grid
