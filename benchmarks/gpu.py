"""The cost of a training step at a real size, as ratios of paired, interleaved steps, and its memory.

    python benchmarks/gpu.py                    # ViT-B/16 to ViT-S/16 at 224 px, batch 64, float32: needs a GPU
    python benchmarks/gpu.py --bf16             # under autocast
    torchrun --standalone --nproc_per_node 1 benchmarks/gpu.py --rows "plain Trainer" task logit_kd   # through DDP
    python benchmarks/gpu.py --tiny             # tiny models on whatever there is: whether the script runs

Random weights and one batch that stays on the device, so that neither a download nor data loading is in the figures.
Memory is the peak of a run alone: weights, gradients, optimizer, teacher and activations. benchmarks/gpu.sh runs all
of it and prints what RESULTS.md takes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, ViTConfig, ViTForImageClassification
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from interleave import Loop, interleave, ratio
from step_cost import KD, by_trainer

from hf_kdtl import DistillationConfig, DistillationTrainer

PLAIN, HAND = "plain Trainer", "logit KD by hand"
# name: (objectives, gradient rule)
OURS: dict[str, tuple[list[dict], dict | None]] = {
    "task": ([{"name": "task"}], None),
    "logit_kd": (KD, None),
    "logit_kd + attention_map": ([*KD, {"name": "attention_map"}], None),
    "logit_kd + hidden_states": ([*KD, {"name": "hidden_states"}], None),
    "logit_kd + jacobian": ([*KD, {"name": "jacobian"}], None),
    "logit_kd + hessian": ([*KD, {"name": "hessian"}], None),
    "logit_kd, never_hurt": (KD, {"name": "never_hurt"}),
}
ROWS = [PLAIN, HAND, *OURS]


def vit(layers: int, width: int, heads: int, size: int, patch: int, classes: int) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=size, patch_size=patch, num_labels=classes,
    ))  # fmt: skip


class Bench:
    """The pair, one batch on the device, and a loop of training steps for each row."""

    def __init__(self, options: argparse.Namespace):
        torch.manual_seed(0)
        shape = (32, 8, 10) if options.tiny else (224, 16, 1000)
        self.student = vit(2, 32, 2, *shape) if options.tiny else vit(12, 384, 6, *shape)
        self.teacher = (vit(3, 48, 3, *shape) if options.tiny else vit(12, 768, 12, *shape)).eval()
        self.batch, self.bf16 = options.batch, options.bf16
        # One for all: a second TrainingArguments would part the processes of torchrun.
        self.args = DistillationConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=self.batch, learning_rate=1e-4, report_to=[],
            disable_tqdm=True, save_strategy="no", logging_strategy="no", bf16=self.bf16, tf32=options.tf32,
            dataloader_pin_memory=False, objectives=[{"name": "task"}], use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        self.device = self.args.device
        self.teacher.to(self.device)
        images = torch.randn(self.batch, 3, shape[0], shape[0], device=self.device)
        self.inputs = {"pixel_values": images, "labels": torch.arange(self.batch, device=self.device) % shape[2]}

    def loop(self, row: str, steps: int) -> Loop:
        """That many training steps of a row, on a copy of the student."""
        return self._timed(self._by_hand(steps) if row == HAND else by_trainer(self._trainer(row, steps)))

    def _timed(self, loop: Loop) -> Loop:
        def with_waiting(done):
            def waited():
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                done()

            loop(waited)

        return with_waiting

    def _trainer(self, row: str, steps: int) -> Trainer:
        args: Any = copy.copy(self.args)
        args.max_steps = steps
        rows = range(self.batch * 4)  # the images are in the collator
        common: dict[str, Any] = {"train_dataset": rows, "data_collator": lambda rows: dict(self.inputs)}
        student = copy.deepcopy(self.student)
        if row == PLAIN:
            trainer = Trainer(student, args, **common)
        else:
            args.objectives, args.gradient_rule = OURS[row]
            teacher = None if row == "task" else self.teacher
            trainer = DistillationTrainer(student, args, teacher=teacher, **common)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _by_hand(self, steps: int) -> Loop:
        """Two forwards, backward, clipping and AdamW, without any trainer."""

        def loop(done):
            model: Any = copy.deepcopy(self.student).to(self.device).train()
            if dist.is_initialized():
                model = DistributedDataParallel(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
            for _ in range(steps):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    with torch.no_grad():
                        z_t = self.teacher(pixel_values=self.inputs["pixel_values"]).logits.float()
                    z_s = model(pixel_values=self.inputs["pixel_values"]).logits.float()
                log_s, log_t = F.log_softmax(z_s / 4, -1), F.log_softmax(z_t / 4, -1)
                loss = 0.1 * F.cross_entropy(z_s, self.inputs["labels"])
                loss = loss + 0.9 * 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
                loss.item()  # Trainer looks at every loss for nan
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                done()

        return loop

    def peak(self, row: str) -> str:
        """GiB of GPU memory at the most in three steps of a row alone."""
        if self.device.type != "cuda":
            return "-"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.loop(row, 3)(lambda: None)
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tf32", action="store_true", help="float32 matrix products rounded to 10 bits")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that the script runs")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("error: found no CUDA device; this size needs one. --tiny tries the script on the CPU.")
    logging.set_verbosity_error()
    bench = Bench(options)
    memory = {row: bench.peak(row) for row in options.rows}
    times = interleave({row: bench.loop(row, options.steps) for row in options.rows})
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    precision = "bf16 autocast" if options.bf16 else "float32, TF32" if options.tf32 else "float32"
    models = "tiny models" if options.tiny else "ViT-B/16 to ViT-S/16, 224 px"
    ddp = f", DDP of {dist.get_world_size()}" if dist.is_initialized() else ""
    print(f"\n{models}, batch {options.batch}, {precision}{ddp}; {name}, torch {torch.__version__}, "
          f"{options.steps} steps\n")  # fmt: skip
    bases = [base for base in (PLAIN, HAND) if base in options.rows]
    print(f"| step | {' | '.join(f'/ {base} (95 %)' for base in bases)} | images/s | peak memory, GiB |")
    print(f"| --- |{' ---: |' * (len(bases) + 2)}")
    for row in options.rows:
        cells = [
            "{:.3f} ({:.3f} to {:.3f})".format(*ratio(times, row, base)) if row != base else "1" for base in bases
        ]
        cells += [f"{options.batch / statistics.median(times[row]):.0f}", memory[row]]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
