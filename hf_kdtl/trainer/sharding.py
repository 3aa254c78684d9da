"""A Trainer that shards by FSDP2 where the launcher requests it, and saves unsharded checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.trainer.checkpointing import CheckpointingTrainer
from hf_kdtl.trainer.distiller import Distiller
from hf_kdtl.utils.distributed import LAUNCHED, fsdp_requested, gather_full, shard_like


def shard(distiller: Distiller, **options: Any) -> Distiller:
    """Make every block, the modules around them and every objective with parameters a unit of FSDP2; the teacher too.

    DistillationTrainer calls it where `accelerate launch` requests FSDP2. In your own loop build the container
    with `context=RunContext.of(student, teacher, sharded=True)`, by which objectives choose what is exact here or
    refuse; then shard it; then make the optimizer. Every process calls it, for equal weights.

    The student is a unit of its own within the container: a derivative's inner backward pass ends by resharding the
    outermost unit, and the student runs again after it.

    Args:
        options: of `torch.distributed.fsdp.fully_shard`, such as mesh.

    Returns:
        the container, changed in place.

    Raises:
        ValueError: for a container that splits its terms for a gradient rule; when a model's blocks are not found.
    """
    if distiller.split_terms is not None:
        raise ValueError(
            "a gradient_rule compares full gradients, and FSDP2 leaves each process a shard of them. Use DDP, or no "
            "gradient_rule."
        )
    teachers = [module for name, source in distiller.sources.items() if name != "start" for module in source.modules()]
    models: list[Any] = [distiller.student, *teachers]
    for model in models:
        if isinstance(model, FSDPModule):
            continue  # a teacher that another run has sharded
        for _, block in find_blocks(model):
            fully_shard(block, **options)
        # Resharded after the backward pass only: one that begins inside the model fetches nothing around the blocks.
        fully_shard(model, **options, reshard_after_forward=False)
    for objective in distiller.objectives.values():
        if any(True for _ in objective.parameters()):
            fully_shard(objective, **options)
    if not isinstance(distiller, FSDPModule):
        fully_shard(distiller, **options)
        _begin(distiller)
    return distiller


def _begin(distiller: Distiller) -> None:
    """Run the container with an empty forward: FSDP2 takes the first module that runs for the outermost, and the
    student may run alone before a training step (to be evaluated, to have its layers counted)."""
    vars(distiller)["forward"] = lambda: None
    try:
        distiller()
    finally:
        del vars(distiller)["forward"]


class ShardingTrainer(CheckpointingTrainer):
    """A Trainer that shards as `shard` does, where `accelerate launch` is configured for FSDP.

    Accelerate only starts the processes. Its own sharding finds an optimizer's parameters again by their addresses,
    which the empty shards of small ones share; Trainer's saves sharded tensors, by the student's names. Here a
    checkpoint is that of one process, and one process, DDP and FSDP2 resume each other's.
    """

    sharded = False
    """Whether training shards."""

    _full_state: Mapping[str, dict[str, Tensor]] = {}  # of sharded modules, while they are saved

    @property
    def distiller(self) -> Distiller:
        raise NotImplementedError

    def create_accelerator_and_postprocess(self) -> None:
        self.sharded = fsdp_requested()
        with _only_launched():
            super().create_accelerator_and_postprocess()

    def _shard(self) -> None:
        """Shard the container, equal on all processes, and prepare it. Once: later calls keep it."""
        container, args = self.distiller, self.args
        if not isinstance(container, FSDPModule):
            # As DDP does when it wraps: a head with random weights may be another one on every process.
            for tensor in (*container.parameters(), *container.buffers()):
                dist.broadcast(tensor.data, 0)
            shard(container, mesh=init_device_mesh(args.device.type, (args.world_size,)))
        # For autocast; evaluation_mode leaves out DDP.
        self.model_wrapped = self.accelerator.prepare_model(container, device_placement=False, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert not self.sharded or all(isinstance(p, DTensor) for p in held), (
            "the optimizer holds unsharded copies, which are discarded"
        )
        return optimizer

    def evaluation_loop(self, *args, **kwargs):
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()  # the modules around the blocks wait for a backward pass

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # ---- Saving: all processes gather before one writes: one that cannot would leave the others waiting ----

    def _save_parts(self, output_dir: str) -> None:
        with self._gathered(objectives=self.distiller.objectives):
            super()._save_parts(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._gathered(student=self.model):
            super().save_model(output_dir, _internal_call)

    @contextmanager
    def _gathered(self, **modules: Any) -> Iterator[None]:
        """Within it `_full_state` has the tensors of modules that are sharded."""
        if isinstance(self.model, FSDPModule):
            self._full_state = {
                name: gather_full(module.state_dict(), self.args.should_save) for name, module in modules.items()
            }
        try:
            yield
        finally:
            self._full_state = {}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, self._full_state.get("student", state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        inner: Any = self.optimizer.optimizer  # type: ignore[union-attr]
        state = inner.state_dict()
        state["state"] = {i: gather_full(values, self.args.should_save) for i, values in state["state"].items()}
        with inner.register_state_dict_post_hook(lambda optimizer, parts: state):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded:
            return super()._load_optimizer_and_scheduler(checkpoint)
        inner: Any = self.optimizer.optimizer  # type: ignore[union-attr]
        with inner.register_load_state_dict_pre_hook(_shard_optimizer_state):
            super()._load_optimizer_and_scheduler(checkpoint)


def _shard_optimizer_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's full state, sharded as its parameters are; other values are one per parameter (a step)."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {i: {k: shard_like(v, own[i]) for k, v in values.items()} for i, values in state["state"].items()}
    return state | {"state": found}


@contextmanager
def _only_launched() -> Iterator[None]:
    """Hide from accelerate that it is to shard."""
    before = os.environ.pop(LAUNCHED, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[LAUNCHED] = before
