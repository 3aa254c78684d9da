"""What of a pair of models and of how it is run decides which derivatives are exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.teachers.source import SignalSource, SourceFacts, called
from hf_kdtl.utils.versions import CHECKPOINTING

NONSMOOTH = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold,
    nn.MaxPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


@dataclass(frozen=True)
class RunContext:
    """Facts that objectives choose by.

    Args:
        trainable: the student has parameters that learn.
        sharded: the student or the teacher is under FSDP2, where a double backward gives zero gradients or fails.
        compiled: the models run under torch.compile, which has no double backward and no forward mode.
        checkpointing: blocks are recomputed in the backward pass.
        batch_norm: the student has BatchNorm.
        nonsmooth_layers: who has which types of layers with kinks, in words.
        low_precision: who has quantised weights, or weights of half precision, in words.
        tf32: matrix products or convolutions on CUDA round their inputs to 10 bits.
        coupled: types of the student's layers whose statistics are of the batch or the image, without running ones.
        multi_label: the student has several labels an image.
        teacher: the source of an objective's signals, for objectives that were made for one teacher alone.
        facts: {"student" or a source's name: what nonsmooth_layers and low_precision are said of}.
    """

    trainable: bool = True
    sharded: bool = False
    compiled: bool = False
    checkpointing: bool = False
    batch_norm: bool = False
    nonsmooth_layers: tuple[str, ...] = ()
    low_precision: tuple[str, ...] = ()
    tf32: bool = False
    coupled: str = ""
    multi_label: bool = False
    teacher: SignalSource | None = None
    facts: Mapping[str, SourceFacts] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        student: nn.Module,
        sources: Mapping[str, SignalSource],
        compiled: bool = False,
        checkpointing: bool = False,
        sharded: bool = False,
    ) -> RunContext:
        """Read the models; `compiled`, `checkpointing` and `sharded` are what the run will do with them.

        Args:
            sources: {name: where its signals come from}; empty without a teacher.
        """
        own = SourceFacts(nonsmooth_layers(student), low_precision(student), is_sharded(student))
        facts = {"student": own} | {name: source.facts() for name, source in sources.items()}
        return cls(
            trainable=any(p.requires_grad for p in student.parameters()),
            sharded=sharded or any(fact.sharded for fact in facts.values()),
            compiled=compiled or any(getattr(m, "_compiled_call_impl", None) for m in student.modules()),
            checkpointing=checkpointing or bool(getattr(student, f"is_{CHECKPOINTING}", False)),
            batch_norm=any(isinstance(m, _BatchNorm) for m in student.modules()),
            multi_label=is_multi_label(student),
            facts=facts,
            **_in_words(facts),
            tf32=_tf32(),
            coupled=", ".join(sorted({type(m).__name__ for m in student.modules() if _coupled(m)})),
            teacher=sources.get("teacher"),
        )

    def of_source(self, name: str, source: SignalSource | None) -> RunContext:
        """The same for an objective that takes its signals from this source: the others' weights do not matter."""
        others = self.facts.keys() - {"student", name}
        mine = {who: fact for who, fact in self.facts.items() if who in ("student", name)}
        return replace(self, teacher=source, **(_in_words(mine) if others else {}))


def _in_words(facts: Mapping[str, SourceFacts]) -> dict[str, Any]:
    named = {("the student" if who == "student" else called(who)): fact for who, fact in facts.items()}
    return {
        "nonsmooth_layers": tuple(f"{who} has {f.nonsmooth_layers}" for who, f in named.items() if f.nonsmooth_layers),
        "low_precision": tuple(f"{who} has {f.low_precision} weights" for who, f in named.items() if f.low_precision),
    }


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread its weights over processes."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def not_differentiable(model: Any) -> str:
    """Why no derivative by the pixels is taken of a model, with what to type; empty where it can be."""
    placed = getattr(model, "hf_device_map", None) or {}
    if low_precision(model) == "quantised":
        why = "quantised, and kernels of quantised weights give no exact gradient"
    elif len({str(place) for place in placed.values()}) > 1:
        why = f"spread over {len(set(map(str, placed.values())))} places (device_map), by hooks that move its inputs"
    else:
        return ""
    return f"the teacher is {why}. Load it as it is, or use objectives without derivatives, such as logit_kd."


def low_precision(model: nn.Module) -> str:
    """How a model's weights are rounded, in a word; empty for 32 bits and more."""
    dtypes = {p.dtype for p in (*model.parameters(), *model.buffers())}
    quantised = getattr(model, "hf_quantizer", None) or getattr(model, "quantization_method", None)
    if (
        quantised
        or dtypes & {torch.int8, torch.uint8}
        or any("quantized" in type(m).__module__ for m in model.modules())
    ):
        return "quantised"
    return "half-precision" if dtypes & {torch.float16, torch.bfloat16} else ""


def _coupled(module: nn.Module) -> bool:
    """Whether a layer has statistics of what it sees and no running ones to take instead."""
    if isinstance(module, _InstanceNorm):
        return True
    return isinstance(module, _BatchNorm) and module.running_mean is None


def _tf32() -> bool:
    backends: Any = torch.backends  # some of whose modules are not in its stubs
    parts = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
    return torch.cuda.is_available() and "tf32" in parts


def nonsmooth_layers(model: nn.Module) -> str:
    """The types of layers with kinks, as text; empty for a smooth net. What is no module (F.relu) is not seen."""
    return ", ".join(sorted({type(m).__name__ for m in model.modules() if isinstance(m, NONSMOOTH)}))
