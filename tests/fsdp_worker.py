"""One gradient of derivative objectives, of a whole model or under FSDP2; started by torchrun with two processes.

python -m tests.fsdp_worker OUT
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_kdtl.distiller import Distiller
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher
from hf_kdtl.objectives import OBJECTIVES
from tests.helpers import leave
from tests.tiny import build

IMAGES = 6
WAYS = {
    "split": ("jacobian", {"estimator": "split"}),
    "central": ("jacobian", {"estimator": "split", "central": True, "step": 0.01}),
    "auto": ("jacobian", {}),
    "differences": ("jacobian", {"distance": "fisher", "output": "all", "step": 0.01}),
    "norm": ("jacobian_norm", {}),
}


def gradient(way, rows, shard=None):
    """{name: gradient} of the mean over all images, from the images `rows`."""
    student, teacher = build("vit").double(), build("vit", seed=5).double()
    if shard is not None:
        for layer in student.vit.layers:
            fully_shard(layer, mesh=shard)
        fully_shard(student, mesh=shard)
    name, options = WAYS[way]
    made = Distiller(student, {"a": OBJECTIVES[name](**options)}, {"a": 1.0}, Teacher(teacher))
    pixels = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()
    inputs = {"pixel_values": pixels[rows], "labels": (torch.arange(IMAGES) % 3)[rows]}
    draws = Draws(0, 0, tuple(range(IMAGES))).permuted(torch.tensor(rows))
    counts = {"images": torch.tensor(IMAGES), "labelled": torch.tensor(IMAGES)}
    result = made(inputs, draws, counts, 2 if shard is not None else 1)
    result["loss"].backward()
    found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if shard is not None else g).contiguous() for n, g in found.items()}


def refusal(shard):
    """What is said when a double backward is asked for."""
    student = build("vit")
    fully_shard(student, mesh=shard)
    try:
        Distiller(student, {"a": OBJECTIVES["jacobian"](estimator="vjp")}, {"a": 1.0}, Teacher(build("vit", seed=5)))
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    half = IMAGES // 2
    mine = list(range(half)) if dist.get_rank() == 0 else list(range(half, IMAGES))
    tensors = {f"{way}/{n}": g for way in WAYS for n, g in gradient(way, mine, mesh).items()}
    said = refusal(mesh)
    if dist.get_rank() == 0:
        save_file(tensors, sys.argv[1], metadata={"world": str(dist.get_world_size()), "refused": said})
    leave()
