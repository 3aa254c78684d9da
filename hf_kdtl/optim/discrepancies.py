"""From two models and a micro-batch to what the discrepancies are made of, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

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
from hf_kdtl.models.forward.attention_hooks import Attention
from hf_kdtl.models.forward.block_calls import BlockCall
from hf_kdtl.models.forward.capture import Capture, Needs, capture
from hf_kdtl.models.forward.geometry import LayerGeometry, ModelGeometry
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.pairing import Pair, PairingPlan
from hf_kdtl.models.teachers.source import SignalSource
from hf_kdtl.optim.options import RateOptions


def rated_pairs(options: RateOptions, plan: PairingPlan | None, sizes: Sequence[int]) -> list[Pair]:
    """The pairs whose student block is trained, in depth order.

    Raises:
        ValueError: without a plan; for a frozen block that was named by hand; as `check_pairs`.
    """
    if not options.measured:
        return []
    if plan is None:
        raise ValueError(
            f"layer_rates: mode {options.mode!r} compares the student with a teacher, and there is no plan of both. "
            "Pass LayerRates(options, student, hf_kdtl.models.plan(student, teacher)), or take mode 'llrd'."
        )
    pairs = sorted(plan.pair(options.layers), key=lambda pair: pair.student_layer)
    frozen = [pair.student_layer for pair in pairs if not sizes[pair.student_layer]]
    if frozen and isinstance(options.layers, list):
        raise ValueError(
            f"layer_rates: layers names the student's blocks {frozen}, which are frozen and have no rate; leave them "
            "out, or unfreeze them."
        )
    pairs = [pair for pair in pairs if pair.student_layer not in frozen]
    check_pairs(options, pairs)
    return pairs


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
    """What the source of `options` reads of (student, teacher)."""
    student, teacher = (frozenset(getattr(p, f"{who}_layer") for p in pairs) for who in ("student", "teacher"))
    if options.source == "attention" and options.map == "class":
        # Of the teacher the row alone, where the class token is the first: it can be stored.
        rows = frozenset(p.teacher_layer for p in pairs if p.teacher.prefix.index("class") == 0)
        return Needs(attention=student), Needs(attention=teacher - rows, attention_rows=rows)
    if options.source == "attention":
        return Needs(hidden_states=student), Needs(hidden_states=teacher)
    if options.wrt == "parameters":
        return Needs(block_calls=student), Needs(block_calls=teacher)
    by_pixels = Needs(input_gradient=True)
    return Needs(hidden_states=student) | by_pixels, Needs(hidden_states=teacher) | by_pixels


@torch.no_grad()
def attention_discrepancies(options: RateOptions, pairs: Sequence[Pair], student: Capture, teacher: Capture) -> Tensor:
    """D of every image and pair, (B, pairs) nats: JSD of the maps over the student's patches.

    `map` energy: mean_d h^2 of each patch. class: the class token's attention to the patches, mean over heads, what it
    gives to other tokens left out. The teacher's map is brought to the student's grid with its sums kept.
    """
    found = []
    for pair in _at(options, pairs, student, teacher):
        p = _map(options, student, pair.student_layer, pair.student, _grid(pair.student))
        q = _map(options, teacher, pair.teacher_layer, pair.teacher, _grid(pair.student))
        found.append(discrepancy(distribution(p), distribution(q)))
    return torch.stack(found, 1)


def _at(options: RateOptions, pairs: Sequence[Pair], student: Capture, teacher: Capture | None = None) -> list[Pair]:
    """The pairs with the grids of these captures, checked again where the images are of another size than the plan's.

    Raises:
        ValueError: as `check_pairs`.
    """
    here = [pair.at(student.geometry, None if teacher is None else teacher.geometry) for pair in pairs]
    if here != list(pairs):
        check_pairs(options, here)
    return here


def _map(options: RateOptions, captured: Capture, layer: int, geometry: LayerGeometry, grid: Grid) -> Tensor:
    if options.map == "class":
        return _class_row(captured, layer, geometry, grid)
    hidden = captured.hidden_states[layer]
    tokens = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    return redistribute(energy(tokens[:, len(geometry.prefix) :]), _grid(geometry), grid)


def _class_row(captured: Capture, layer: int, geometry: LayerGeometry, grid: Grid) -> Tensor:
    if layer in captured.attention_rows:
        log_p = captured.attention_rows[layer][:, None, None]
    else:
        log_p = _mean_row(captured.attention[layer], geometry.prefix.index("class"))
    return align_columns(log_p, (), len(geometry.prefix), _grid(geometry), grid).exp()[:, 0, 0]


def _mean_row(a: Attention, row: int) -> Tensor:
    """log A of one token, mean over heads, (B, 1, 1, N)."""
    if a.weights is not None:
        return mean_heads(a.weights[:, :, row : row + 1].log())
    assert a.query is not None and a.key is not None
    bias = None if a.bias is None else a.bias[..., row : row + 1, :].expand(*a.bias.shape[:-2], 1, -1)
    return mean_heads(attention_rows(a.query[:, :, row : row + 1], a.key, a.scale, bias))


def input_discrepancies(
    options: RateOptions,
    pairs: Sequence[Pair],
    geometry: ModelGeometry,
    student: nn.Module,
    teacher: SignalSource,
    x: Tensor,
    draws: Draws,
) -> Tensor:
    """D of every image and pair, (B, pairs) nats, of derivatives by the student's pixels x (B, C, h, w).

    Both derivatives are by the student's x: what the teacher does to its pixels first is part of it. Source hessian
    takes every second image of the effective batch, to stay within its cost.

    Args:
        geometry: the student's.
    """
    if options.source == "hessian":
        x = x[[i for i, position in enumerate(draws.positions) if position % 2 == 0]]
        draws = Draws(draws.seed, draws.step, tuple(p for p in draws.positions if p % 2 == 0))
        if not len(x):
            return x.new_zeros(0, len(pairs), dtype=torch.float64)
    if (x.shape[-2], x.shape[-1]) != geometry.image:
        with torch.no_grad(), evaluating(student):
            pairs = _at(options, pairs, capture(student, x[:1], needs(options, pairs)[0].plain(), geometry))
    grids = [_grid(pair.student) for pair in pairs]
    teacher.geometry(x)  # looked up now: not inside the transforms below
    found = []
    for run, context, layers in _sides(pairs, geometry, student, teacher):
        with torch.enable_grad(), context:
            energies = _input_energies(options, partial(_output_energies, run, layers), x, grids, draws)
        found.append([distribution(e) for e in energies])
    return torch.stack([discrepancy(*both) for both in zip(*found, strict=True)], 1)


def _sides(
    pairs: Sequence[Pair], geometry: ModelGeometry, student: nn.Module, teacher: SignalSource
) -> list[tuple[Callable[..., Capture], AbstractContextManager, list[int]]]:
    """Of student and teacher: how it is captured, the mode it is measured in, and its layers in the pairs."""
    return [
        (partial(capture, student, geometry=geometry), evaluating(student), [pair.student_layer for pair in pairs]),
        (teacher.capture, teacher.eval_context(), [pair.teacher_layer for pair in pairs]),
    ]


def _output_energies(run: Callable[..., Capture], layers: Sequence[int], z: Tensor) -> list[Tensor]:
    captured = run(z, needs=Needs(hidden_states=frozenset(layers)))
    return [output_energy(captured.hidden_states[layer]) for layer in layers]


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
    options: RateOptions,
    pairs: Sequence[Pair],
    geometry: ModelGeometry,
    student: nn.Module,
    teacher: SignalSource,
    x: Tensor,
    draws: Draws,
) -> Tensor:
    """(B, pairs, 2) energies of student and teacher by the blocks' own parameters, each block's input held fixed."""
    found = []
    for (run, context, layers), wanted in zip(
        _sides(pairs, geometry, student, teacher), needs(options, pairs), strict=True
    ):
        with context:
            with torch.no_grad():
                captured = run(x, needs=wanted)
            found.append(_block_energies(options, captured, layers, draws))
    return torch.stack(found, 2)


def _block_energies(options: RateOptions, captured: Capture, layers: Sequence[int], draws: Draws) -> Tensor:
    images = len(captured.pixel_values)
    calls = [captured.block_calls[layer] for layer in layers]
    return torch.stack([_block_energy(options, i, call, images, draws) for i, call in enumerate(calls)], 1)


def _block_energy(options: RateOptions, place: int, call: BlockCall, images: int, draws: Draws) -> Tensor:
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


def _grid(layer: LayerGeometry) -> Grid:
    assert layer.grid is not None  # check_pairs
    return layer.grid
