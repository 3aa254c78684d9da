"""What the names of the tensors in a file say: whether it is the file of the model that was opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NOT_READ = ("mask_token", "num_batches_tracked")
"""Tensors that no answer of a model without masked patches depends on."""


def check_names(lacking: list[str], unexpected: list[str], model: Any, who: str) -> None:
    """Refuse a file whose names have a prefix, and one with more blocks than the config says."""
    names = set(model.state_dict())
    for prefix in {key[: -len(name)] for key in unexpected for name in lacking if key.endswith(f".{name}")}:
        if sum(key.removeprefix(prefix) in names for key in unexpected) > len(unexpected) / 2:
            raise ValueError(
                f"the names of the weights of {who} begin with {prefix!r} (as a wrapper of the model, such as "
                f"nn.DataParallel, saves them), so none was loaded. Pass key_mapping={{{_pattern(prefix)}: ''}} to "
                "from_pretrained, or save the model inside the wrapper: model.module.save_pretrained(folder)."
            )
    shapes = {re.sub(r"\.\d+\.", ".#.", name) for name in names}
    if left := [key for key in unexpected if re.sub(r"\.\d+\.", ".#.", key) in shapes]:
        raise ValueError(
            f"the file of {who} has {len(left)} weights of further blocks that its config leaves out: "
            f"{describe_missing(left, {})}. Expected a config with as many blocks as the file; for fewer of them use "
            "hf_kdtl.make_student(teacher, layers=...)."
        )


def unread_weights(unexpected: Sequence[str], model: Any, who: str) -> list[str]:
    """A sentence on the tensors of a file that the model does not have, such as those of a decoder or of another
    head; nothing where there are none.

    Raises:
        ValueError: for weights inside its blocks, or of a module that it has: it would answer otherwise than the
            model that was saved.
    """
    modules, computed = dict(model.named_modules()), dict(model.named_buffers())
    left = [key for key in unexpected if key.rpartition(".")[2] not in NOT_READ]
    left = [key for key in left if not any(name in computed for name in _own_names(key, model))]
    if lost := [key for key in left if any(_belongs(name, modules) for name in _own_names(key, model))]:
        raise ValueError(
            f"the file of {who} holds weights that {type(model).__name__} leaves out by its config.json: "
            f"{describe_missing(lost, {})}. Its answers would be others than those of the model that was saved: "
            "correct the config.json (such as qkv_bias), or save the model again with model.save_pretrained(folder)."
        )
    if not left:
        return []
    parts = sorted({key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] for key in left})
    return [
        f"the file of {who} also holds tensors that {type(model).__name__} does not have and that are not read "
        f"({describe_missing(parts, {})}: {len(left)}). If it should have them, correct its config.json."
    ]


def _own_names(key: str, model: Any) -> list[str]:
    """What a tensor of the file may be called in the model: one of the two may be the other's backbone, and a file of
    more than the backbone has names without its prefix for what is beside it."""
    prefix, backbone = f"{model.base_model_prefix}.", model.base_model
    if [type(backbone).__name__] == (model.config.architectures or []):
        return [key if backbone is model else prefix + key]
    return [key, key.removeprefix(prefix)] if backbone is not model or key.startswith(prefix) else [f"beside.{key}"]


def _belongs(name: str, modules: dict[str, Any]) -> bool:
    """Whether a tensor of this name is of a module that is there, or lies inside one of a list, such as a block."""
    parts = name.split(".")[:-1]
    owner = next((parts[:n] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules), [])
    return bool(owner) and (owner == parts or any(part.isdigit() for part in owner))


def _pattern(prefix: str) -> str:
    return "r'^" + prefix.replace(".", "\\.") + "'"


def describe_missing(names: Sequence[str], mismatched: dict[str, Any], most: int = 4) -> str:
    """The first of some tensors, with their shapes where these differ."""
    shown = [
        f"{name} {mismatched[name][0]} in place of {mismatched[name][1]}" if name in mismatched else name
        for name in names[:most]
    ]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
