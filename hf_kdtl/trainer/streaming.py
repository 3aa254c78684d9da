"""A Trainer on streams: each process reads its own part, and a resumed run passes over what was trained on."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_kdtl.data.stream import ImageStream


class StreamingTrainer(Trainer):
    """A Trainer whose train_dataset may be an `ImageStream`. Others are as Trainer has them."""

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not (is_training and isinstance(dataset, ImageStream)):
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        args = self.args
        dataset.place(args.process_index, args.world_size)
        settings: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "generator": torch.Generator().manual_seed(args.seed),  # not the global one, which training draws from
        }
        collate = self._get_collator_with_removed_columns(self.data_collator, description)
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, drop_last=True, **settings)
        # As of one process: accelerate would let process 0 read for all, or every process read everything.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if isinstance(self.train_dataset, ImageStream):
            self.train_dataset.pass_over(batches, self._train_batch_size)
        return epoch, batches
