"""A student cut out of its teacher."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdtl.models.blocks import find_blocks, stated_depth, uniform_layers, vision_config
from hf_kdtl.models.forward.capture import Needs
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.models.teachers.teacher import Teacher


def make_student(teacher: PreTrainedModel | Teacher | str | Path, layers: int = 6) -> PreTrainedModel:
    """A smaller model of the teacher's class: every k-th block, the embeddings, the norm and the head, copied.

    Works for families whose depth is one number, `config.num_hidden_layers`: ViT, DeiT, DINOv2, BEiT, data2vec-vision,
    ViT-MSN, I-JEPA, SigLIP, CLIP ... The blocks are those of `uniform_layers`, so that block s of the student starts
    as the teacher block that later objectives pair it with: 6 of 12 copies 1, 3, ... 11. What depends on depth alone
    (stochastic depth) is the student's own, from its config. With all layers the logits are the teacher's.

    Args:
        teacher: an image classifier, a Teacher, or a path or Hub name. It is left as it was.
        layers: blocks of the student, 1 to the teacher's number.

    Returns:
        The student, in eval mode, every parameter trainable, on the device of the teacher and in its dtype, but of a
        teacher in half precision a float32 one, because half-precision weights do not train. It shares no memory with
        the teacher, and `save_pretrained` and `from_pretrained` work as for any model of its class.

    Raises:
        TypeError: `teacher` is not an image classifier of transformers.
        ValueError: `layers` outside the range; a model built in stages; blocks not found; a teacher whose tensors are
            not those of its own config (adapters, a replaced head), so that the student would not be a copy; a file
            that lacks weights.
    """
    if isinstance(teacher, str | Path):
        teacher = open_classifier(teacher, role="the teacher").model
    if isinstance(teacher, Teacher) and (problem := teacher.unserved(Needs(logits=True))):
        raise ValueError(problem)
    model = teacher.classifier() if isinstance(teacher, Teacher) else teacher
    if not isinstance(model, PreTrainedModel) or not _classifies_images(model):
        raise TypeError(
            f"a student can be cut out of an image classifier of transformers, found {type(model).__name__}. Load the "
            "teacher with AutoModelForImageClassification.from_pretrained; if it is wrapped by PEFT, pass "
            "teacher.merge_and_unload()."
        )
    blocks = [name for name, _ in find_blocks(model)]
    _check_one_depth(model, len(blocks))
    picks = uniform_layers(layers, len(blocks))
    with torch.random.fork_rng(devices=[]):  # its own weights are all replaced, so the caller's draws go on as before
        student: Any = type(model)(_cut_config(model.config, picks))
    _copy_weights(model, student, [blocks[pick] for pick in picks], blocks)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in student.parameters())
    return (student.float() if half else student).to(model.device).eval()


def _classifies_images(model: PreTrainedModel) -> bool:
    return any("ForImageClassification" in cls.__name__ for cls in type(model).__mro__)


def _check_one_depth(model: PreTrainedModel, found: int) -> None:
    depths, depth = stated_depth(model.config)
    if depths is None and depth == found:
        return
    name, config = type(model).__name__, type(model.config).__name__
    raise ValueError(
        f"{name} is built in stages ({f'depths {depths}' if depths else f'{found} entries, no single depth'}), so "
        "blocks cannot be left out by number; layers= works where config.num_hidden_layers is the depth (ViT, DeiT, "
        f"DINOv2, BEiT, CLIP ...). Type student_config=<a {config} file with smaller depths or widths> in a recipe, "
        f"or {name}({config}(...)) in Python."
    )


def _cut_config(config: Any, picks: list[int]) -> Any:
    """A copy of `config` for a model that keeps the blocks `picks`."""
    config = copy.deepcopy(config)
    config.name_or_path = ""  # it is no longer what was loaded from there
    vision = vision_config(config)
    outputs = vision.num_hidden_layers + 1
    vision.num_hidden_layers = len(picks)
    for key in ("layer_types", "mlp_layer_types"):
        if types := getattr(vision, key, None):
            setattr(vision, key, [types[pick] for pick in picks])
    if getattr(vision, "stage_names", None):
        vision.stage_names = vision.stage_names[: len(picks) + 1]
    if getattr(vision, "out_indices", None):
        # Output 0 is the embeddings, output i block i - 1: it becomes the last kept block up to there. Backbone
        # configs (BEiT, DINOv2) rename out_features when out_indices is set.
        vision.out_indices = sorted({sum(pick < index % outputs for pick in picks) for index in vision.out_indices})
    type(config).from_dict(config.to_dict())  # a config that could not be read back fails now, not after training
    return config


def _copy_weights(teacher: PreTrainedModel, student: PreTrainedModel, kept: list[str], blocks: list[str]) -> None:
    """Give every tensor of `student` the value, dtype and device of its source in `teacher`."""
    renamed = dict(zip(kept, (name for name, _ in find_blocks(student)), strict=True))
    source: dict[str, Tensor] = {}
    for key, tensor in teacher.state_dict().items():
        block = next((name for name in blocks if key.startswith(f"{name}.")), None)
        if block is None:
            source[key] = tensor.clone()
        elif block in renamed:
            source[renamed[block] + key.removeprefix(block)] = tensor.clone()
    expected = {key: tensor.shape for key, tensor in student.state_dict().items()}
    found = {key: tensor.shape for key, tensor in source.items()}
    if expected != found:
        differing = sorted(key for key in expected | found if expected.get(key) != found.get(key))
        lines = [f"{key}: expected {_shape(expected, key)}, found {_shape(found, key)}" for key in differing[:5]]
        raise ValueError(
            f"{len(differing)} tensors of the teacher are not those that a {type(teacher).__name__} of its config has:"
            f" {'; '.join(lines)}. The student would not be a copy. Merge adapters, or put the config right "
            "(num_labels for a replaced head) and load the teacher again."
        )
    student.load_state_dict(source, assign=True)


def _shape(shapes: dict[str, torch.Size], key: str) -> str:
    return str(tuple(shapes[key])) if key in shapes else "none"
