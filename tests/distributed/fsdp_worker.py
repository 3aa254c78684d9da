"""One gradient of objectives, of unsharded models or of sharded ones; started by `launch` with two processes.

python -m tests.distributed.fsdp_worker OUT
"""

import json
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.quantization import round_layers
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.trainer.sharding import shard
from tests.support.helpers import leave
from tests.support.tiny import build

IMAGES = 6
KD, HIDDEN = ("logit_kd", {}), ("hidden_states", {})
# name -> the objectives of one container, in this order
WAYS = {
    "split": [("jacobian", {"estimator": "split"})],
    "central": [("jacobian", {"estimator": "split", "central": True, "step": 0.01})],
    "differences": [("jacobian", {"distance": "fisher", "output": "all", "step": 0.01})],
    "auto with others": [KD, ("jacobian", {}), HIDDEN],  # a projector after an inner backward pass
    "inside": [("attention_jacobian", {}), ("attention_map", {})],
    "rounded": [KD, HIDDEN],  # with the student's layers computing in 8 bits
}


def container(way, sharded=False, parts=None):
    """Student, objectives and teacher, in float64."""
    student, teacher = build("vit").double(), Teacher(build("vit", seed=5).double())
    teacher.match(student, None, True)
    torch.manual_seed(0)
    objectives = {name: OBJECTIVES[name](**options) for name, options in way}
    if way == WAYS["rounded"]:
        round_layers(student)
    context, start = RunContext.of(student, {"teacher": teacher}, sharded=sharded), StartingPoint(student)
    weights, pairing = dict.fromkeys(objectives, 1.0), plan(student, teacher)
    sources, plans = {"teacher": teacher, "start": start}, {"teacher": pairing}
    made = Distiller(student, objectives, weights, sources, plans, context=context, split_terms=parts)
    return made.double()


def gradient(way, rows, mesh=None):
    """{name: gradient} of the mean over all images, from the images `rows`."""
    made = container(WAYS[way], mesh is not None)
    if mesh is not None:
        shard(made, mesh=mesh)
        held = next(made.teacher.model.vit.layers[0].parameters())
        assert held.to_local().numel() < held.numel()  # the teacher too is in parts
    pixels = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()
    inputs = {"pixel_values": pixels[rows], "labels": (torch.arange(IMAGES) % 3)[rows]}
    draws = Draws(0, 0, tuple(range(IMAGES))).permuted(torch.tensor(rows))
    counts = {"images": torch.tensor(IMAGES), "labelled": torch.tensor(IMAGES)}
    result = made(inputs, draws, counts, 2 if mesh is not None else 1)
    result["loss"].backward()
    found = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if mesh is not None else g).contiguous() for n, g in found.items()}


def refusals(mesh):
    """What is reported where FSDP2 would be wrong."""

    def message(make):
        try:
            make()
        except ValueError as error:
            return str(error)
        return "nothing"

    def teacher_alone():
        teacher = build("vit", seed=5)
        fully_shard(teacher, mesh=mesh)
        Distiller(build("vit"), {"a": OBJECTIVES["hessian"]()}, {"a": 1.0}, {"teacher": Teacher(teacher)})

    return {
        "vjp": message(lambda: container([("jacobian", {"estimator": "vjp"})], True)),
        "hessian, by the teacher": message(teacher_alone),
        "l2_sp": message(lambda: container([("l2_sp", {})], True)),
        "rule": message(lambda: shard(container([KD], True, parts="terms"), mesh=mesh)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    half = IMAGES // 2
    mine = list(range(half)) if dist.get_rank() == 0 else list(range(half, IMAGES))
    tensors = {f"{way}/{n}": g for way in WAYS for n, g in gradient(way, mine, mesh).items()}
    message = json.dumps(refusals(mesh))
    if dist.get_rank() == 0:
        save_file(tensors, sys.argv[1], metadata={"world": str(dist.get_world_size()), "refused": message})
    leave()
