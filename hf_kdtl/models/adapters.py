"""Models with adapters (PEFT), used with and without them: the same weights serve as student and as teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.utils.text import one_line


def adapted(model: Any) -> bool:
    """Whether it is a model of PEFT, whose adapters can be turned off for a while."""
    return hasattr(model, "disable_adapter")


BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""The init_lora_weights of PEFT that leave the base weights alone; the others take out of them what the adapter begins
with, so that the model with its adapters off is not the one that was adapted."""


def check_base_kept(model: Any, who: str) -> None:
    """Raises ValueError for adapters that changed the base weights when they were added, naming `who` needs these."""
    for name, config in model.peft_config.items():
        began = getattr(config, "init_lora_weights", True)
        option = f"init_lora_weights={began!r}"
        if getattr(config, "kasa_config", None) is not None:
            option = "kasa_config"
        elif (began.lower() if isinstance(began, str) else began) in BASE_KEPT:
            continue
        raise ValueError(
            f"{who} is the student with its adapters off, and {option} of the adapter {name!r} changed the weights "
            "below it when it was added: without it they are not those of the model that was given. Use "
            "init_lora_weights=True, or train without adapters."
        )


_off: WeakSet[nn.Module] = WeakSet()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model as it was before it was adapted, in eval mode. Modes and what is trainable are put back.

    No backward pass may run inside: PEFT makes the adapters untrainable there.
    """
    if model in _off:  # already: under torch.func PEFT's switches cannot be moved
        yield
        return
    # PEFT turns every adapter trainable again, also those that were frozen.
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    _off.add(model)
    try:
        with evaluating(model), model.disable_adapter():
            yield
    finally:
        _off.discard(model)
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def plain_state(model: Any) -> dict[str, Tensor]:
    """The state_dict of the model without its adapters, under the names that it had before it was adapted."""
    base = model.get_base_model()
    state = base.state_dict()
    return {plain: state[name] for name, plain in plain_names(base, state).items()}


def plain_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name: what the tensor was called before its layer was adapted}; the tensors of adapters are left out."""
    # PEFT wraps a layer, and keeps it by one of these names.
    kept = {name: word for name, inner in module.named_modules() for word in ("base_layer", "original_module")
            if isinstance(getattr(inner, word, None), nn.Module)}  # fmt: skip
    found = {}
    for name in names:
        plain = name
        for wrapped, word in kept.items():
            if not plain.startswith(f"{wrapped}."):
                continue
            rest = plain.removeprefix(f"{wrapped}.")
            if not rest.startswith(f"{word}."):
                break  # of the adapter
            plain = f"{wrapped}.{rest.removeprefix(f'{word}.')}"
        else:
            found[name] = plain
    return found


def adapter_problems(model: Any) -> list[str]:
    """Why what training changes of this model would not come back from its adapters' files; empty where all does."""
    if not adapted(model):
        if not getattr(model, "_hf_peft_config_loaded", False):
            return []
        return [
            "the student's adapters were added by model.add_adapter, and a run with them could not be resumed. Wrap "
            "the model instead: peft.get_peft_model(model, LoraConfig(...))."
        ]
    # Left to itself PEFT asks the Hub about the base model's vocabulary.
    tensors = [
        get_peft_model_state_dict(model, adapter_name=a, save_embedding_layers=False) for a in model.peft_config
    ]
    saved = {tensor.data_ptr() for of_one in tensors for tensor in of_one.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in saved]
    norms = {f"{name}.running_mean": m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    lost += [
        name
        for name, norm in norms.items()
        if norm.running_mean is not None
        and norm.running_mean.data_ptr() not in saved
        and ".original_module." not in name
    ]
    if not lost:
        return []
    owners = sorted({name.split(".")[-2] for name in lost})
    return [
        f"{lost[:3]} change with the student and are in no file of its adapters: they would be lost when it is saved "
        f"or resumed. Name their modules for PEFT to keep: modules_to_save=[..., {str(owners)[1:-1]}]."
    ]


def load_adapters(model: Any, folder: str | Path) -> None:
    """Load the adapters that `model.save_pretrained(folder)` wrote, every tensor of every adapter.

    Through PEFT's own functions, which take what fits and leave the rest as it was, in silence.

    Raises:
        ValueError: when the folder's adapters are others than the model's, or lack a tensor.
    """
    for name in model.peft_config:
        path = Path(folder) if name == "default" else Path(folder, name)
        if not (path / "adapter_config.json").is_file():
            raise ValueError(f"{path} has no adapter {name!r}. Resume with the adapters that were trained there.")
        found, own = (
            load_peft_weights(str(path), device="cpu"),
            get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False),
        )
        wrong = sorted(found.keys() ^ own.keys()) + [
            k for k in found.keys() & own.keys() if found[k].shape != own[k].shape
        ]
        if wrong:
            raise ValueError(
                f"the adapter {name!r} in {path} is not the student's: {wrong[:3]} are missing on one side, or of "
                "another shape. Resume with the same adapter settings (r, target_modules, modules_to_save)."
            )
        set_peft_model_state_dict(model, found, adapter_name=name)


def adapter_kinds(model: Any) -> dict[str, str] | None:
    """{adapter: its kind} of a model with adapters; None of another."""
    found = getattr(model, "peft_config", None)
    if not found or not hasattr(model, "get_base_model"):
        return None
    return {one_line(name): str(getattr(one.peft_type, "value", one.peft_type)) for name, one in found.items()}
