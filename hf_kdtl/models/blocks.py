"""The blocks of a vision model, found by structure and not by a list of names; and which block of a teacher goes with
which block of a student."""

from typing import Any

from torch import nn

Blocks = list[tuple[str, nn.Module]]

# Of the model's parameters: less is no trunk. Small, because a head of 21 841 classes leaves MobileNetV2's blocks 6%.
_LEAST_SHARE = 0.01


def find_blocks(model: nn.Module) -> Blocks:
    """The blocks of `model`, as (qualified name, module) in the order they run.

    Candidates are the outermost ModuleLists and Sequentials, without those of a text tower. They are examined in
    three rounds, and the one with the most parameters is taken from the first round that has any:

    1. containers of stages whose layers are as many, stage by stage, as the config's `depths` (or `depth`): these
       layers are the blocks (Swin, ConvNeXt, ResNet, PVT, ...);
    2. containers with as many entries as the config says in all, by `num_hidden_layers` (ViT, DeiT, DINOv2, BEiT,
       CLIP, ...) or by the sum of `depths`;
    3. containers with two entries or more (EfficientNet; the stages of LeViT and of MobileViT), before those whose
       entries are single layers: EfficientViT's head is one of them, and larger than its stages.

    Neighbouring containers whose names differ by a number alone (torchvision's and timm's ResNets: layer1 to
    layer4) are one.

    A name is a path in `model`: `model.get_submodule(name) is module`. A model wrapped by PEFT gives the same modules,
    their names start with "base_model.model.".

    Raises:
        ValueError: no container qualifies, or it holds less than 1% of the model's parameters; the message lists those
            that were seen.
    """
    depths, depth = stated_depth(getattr(model, "config", None))
    containers = [(name, _entries(name, module)) for name, module in _outermost(model) if "text_model" not in name]
    containers = _numbered_as_one(containers)
    staged = [layers for _, entries in containers if (layers := _layers_of_stages(entries, depths))]
    stated = [entries for _, entries in containers if len(entries) == depth]
    several = [entries for _, entries in containers if len(entries) > 1]
    several = [entries for entries in several if any(_composite(m) for _, m in entries)] or several
    blocks = max(staged or stated or several, key=_size, default=[])
    total = sum(p.numel() for p in model.parameters())
    if blocks and _size(blocks) >= _LEAST_SHARE * total:
        return blocks
    seen = [f"{name} ({len(entries)} entries, {_size(entries) / total:.1%})" for name, entries in containers]
    raise ValueError(
        f"cannot tell which modules of {type(model).__name__} are its blocks: expected a ModuleList or Sequential of "
        f"{depth or 'two or more'} entries with at least {_LEAST_SHARE:.0%} of the parameters, found "
        f"{', '.join(seen) or 'none'}. Put the blocks in one nn.ModuleList and their number in "
        "config.num_hidden_layers."
    )


def uniform_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher block that each student block is paired with, or copied from, when depth is cut evenly.

    Student block s of L_S goes with teacher block floor((s + 1) L_T / L_S) - 1, counted from 0: last with last.

    >>> uniform_layers(6, 12)
    [1, 3, 5, 7, 9, 11]

    Raises:
        ValueError: unless student_layers is a whole number from 1 to teacher_layers.
    """
    if not isinstance(student_layers, int) or not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"found {student_layers!r} student layers for a teacher of {teacher_layers}; type a whole number from 1 "
            f"to {teacher_layers}."
        )
    return [(s + 1) * teacher_layers // student_layers - 1 for s in range(student_layers)]


def vision_config(config: Any) -> Any:
    """Where a config keeps its vision settings: CLIP and SigLIP have a config of their own for them."""
    return getattr(config, "vision_config", config)


def stated_depth(config: Any) -> tuple[list[int] | None, int | None]:
    """(layers per stage, layers in all) as the config states them; None where it does not."""
    config = vision_config(config)
    depths = getattr(config, "depths", None) or getattr(config, "depth", None)  # CvT says depth
    if isinstance(depths, list | tuple):
        return list(depths), sum(depths)
    return None, getattr(config, "num_hidden_layers", None)


def _outermost(module: nn.Module, prefix: str = "") -> Blocks:
    """The non-empty ModuleLists and Sequentials below `module` that lie in no other one."""
    found: Blocks = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            found.append((prefix + name, child))
        else:
            found += _outermost(child, f"{prefix}{name}.")
    return found


def _numbered_as_one(containers: list[tuple[str, Blocks]]) -> list[tuple[str, Blocks]]:
    joined: dict[str, Blocks] = {}
    for name, entries in containers:
        parent, _, own = name.rpartition(".")
        stem = own.rstrip("0123456789")
        key = f"{parent}.{stem}*" if stem and stem != own else name
        joined.setdefault(key, []).extend(entries)
    return list(joined.items())


def _composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _entries(name: str, container: nn.Module) -> Blocks:
    return [(f"{name}.{key}", child) for key, child in container.named_children()]


def _layers_of_stages(entries: Blocks, depths: list[int] | None) -> Blocks:
    """The layers of all stages in one list, if they are as many as `depths` says; otherwise none."""
    stages = [layers for name, entry in entries if (layers := _stage(name, entry))]
    return [layer for stage in stages for layer in stage] if [len(s) for s in stages] == depths else []


def _stage(name: str, module: nn.Module) -> Blocks:
    """The layers of one stage: PVT's is a list itself, others hold one, some next to a smaller one (ConvNeXt's
    downsampling); none for what is no stage."""
    if isinstance(module, nn.ModuleList):
        return _entries(name, module)
    return max((_entries(key, inner) for key, inner in _outermost(module, f"{name}.")), key=_size, default=[])


def _size(blocks: Blocks) -> int:
    return sum(p.numel() for _, module in blocks for p in module.parameters())
