"""The cost of a training step, as ratios of paired, interleaved steps.

    python benchmarks/step_cost.py                 # both tables, about 6 minutes on 2 cores
    python benchmarks/step_cost.py --tables trainer # the overhead of the trainer alone
    python benchmarks/step_cost.py --tables trainer profile --cpu # by CPU time, beside other work; and the operations
    python benchmarks/step_cost.py --tables rates --steps 405   # layer rates: 5 to warm up, two cadences of hessian
    python benchmarks/step_cost.py --tables transfer # gradient rules, and what holds the student to its start
    python benchmarks/step_cost.py --steps 50      # rougher

Teacher 12 layers, 192 wide, 3 heads; student 6 layers, 128 wide, 2 heads; 32 px, patch 8, batch 32, 10 classes,
float32. Prints a table; RESULTS.md keeps one with machine and date.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers import default_data_collator as collate
from transformers import get_linear_schedule_with_warmup as linear
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from interleave import interleave, ratio
from step_profile import show_operations, show_profile

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.optim import RateOptions

BATCH, CLASSES, WARM_UP = 32, 10, 5
KD = [{"name": "task", "weight": 0.1}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}]


def vit(layers: int, width: int, heads: int, image: int = 32, patch: int = 8) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=image, patch_size=patch, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def settings(kind: type, steps: int, **more):
    return kind(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-4, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_steps=50, use_cpu=True, dataloader_pin_memory=False, **more,
    )  # fmt: skip


def by_trainer(runner: Trainer):
    class EachStep(TrainerCallback):
        def __init__(self, done):
            self.done = done

        def on_step_end(self, args, state, control, **kwargs):
            self.done()

    def loop(done):
        runner.add_callback(EachStep(done))
        runner.train()

    return loop


def batches(data):
    """Epoch after epoch, each shuffled."""
    while True:
        yield from DataLoader(data, BATCH, shuffle=True, collate_fn=collate)


def by_hand(student, teacher, data, steps: int):
    """The same work without any trainer: data, two forwards, backward, clipping, AdamW, schedule."""

    def loop(done):
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        schedule = linear(optimizer, 0, steps)
        student.train()
        for batch in islice(batches(data), steps):
            z_s = student(pixel_values=batch["pixel_values"]).logits
            loss = F.cross_entropy(z_s, batch["labels"])
            if teacher is not None:
                with torch.no_grad():
                    z_t = teacher(pixel_values=batch["pixel_values"]).logits
                log_s, log_t = F.log_softmax(z_s / 4, -1), F.log_softmax(z_t / 4, -1)
                loss = 0.1 * loss + 0.9 * 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
            loss.item()  # Trainer looks at every loss for nan
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done()

    return loop


def the_usual_way(student, teacher, data, steps: int):
    """Logit KD and attention rows as public code takes them: eager kernels, output_attentions, all N x N kept."""

    def loop(done):
        for model in (student, teacher):
            model.set_attn_implementation("eager")
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        student.train()
        for batch in islice(batches(data), steps):
            out_s = student(pixel_values=batch["pixel_values"], output_attentions=True)
            with torch.no_grad():
                out_t = teacher(pixel_values=batch["pixel_values"], output_attentions=True)
            log_s, log_t = F.log_softmax(out_s.logits / 4, -1), F.log_softmax(out_t.logits / 4, -1)
            loss = 0.1 * F.cross_entropy(out_s.logits, batch["labels"])
            loss = loss + 0.9 * 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
            for a_s, a_t in zip(out_s.attentions, out_t.attentions[1::2], strict=True):
                rows_s, rows_t = a_s.mean(1)[:, 0], a_t.mean(1)[:, 0]
                loss = loss + F.kl_div(rows_s.log(), rows_t, reduction="batchmean") / 6
            loss.item()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done()

    return loop


BESIDE_KD = {
    "attention_map, rows cls": {"name": "attention_map"},
    "attention_map, rows all": {"name": "attention_map", "rows": "all"},
    "attention_transfer": {"name": "attention_transfer"},
    "hidden_states": {"name": "hidden_states"},
    "relation, last pair": {"name": "relation"},
}


RULES = {
    "never_hurt": {"name": "never_hurt"},
    "never_hurt, orthogonal": {"name": "never_hurt", "form": "orthogonal"},
    "never_hurt, scope tensor": {"name": "never_hurt", "scope": "tensor"},
    "pcgrad": {"name": "pcgrad"},
}

TO_START = {
    "l2_sp": {"name": "l2_sp"},
    "delta": {"name": "delta", "sample": 64},
    "lwf, source start": {"name": "lwf", "source": "start"},
    "bss": {"name": "bss"},
}


# At the default cadence of each source: most steps measure nothing, so the mean step counts and not the median one.
RATES: dict[str, dict] = {
    "attention (every 20)": {"source": "attention"},
    "attention, map class (every 20)": {"source": "attention", "map": "class"},
    "jacobian (every 150)": {"source": "jacobian"},
    "jacobian wrt inputs (every 150)": {"source": "jacobian", "wrt": "inputs"},
    "hessian (every 200)": {"source": "hessian"},
    "hessian wrt inputs (every 200)": {"source": "hessian", "wrt": "inputs"},
}


def mean_ratios(times: dict[str, list[float]], to: str) -> None:
    """Ratios of mean step times over a whole number of cadences, and of the means of steps that do not measure."""
    print("| steps compared | ratio of mean times | share of it in measuring steps |\n| --- | --- | --- |")
    rounds = len(times[to])
    full = rounds - rounds % 200 or rounds
    if full % 200:
        print(f"(only {full} steps: not complete cadences; a multiple of 200 after 5 to warm up is)")
    for name, seconds in times.items():
        if name == to:
            continue
        every = RateOptions.of(RATES[name]).interval if name in RATES else None
        due = [i for i in range(full) if every and (i + WARM_UP) % every == 0]
        base = statistics.mean(times[to][:full])
        extra = sum(seconds[i] - times[to][i] for i in due) / (full * base)
        mean = statistics.mean(seconds[:full]) / base
        print(f"| logit_kd + {name} / logit_kd | {mean:.3f} | {extra:.3f} |", flush=True)


def show(rows: list[tuple[str, float, float, float]]) -> None:
    print("| steps compared | median of paired ratios | 95 % interval |\n| --- | --- | --- |")
    for name, middle, low, high in rows:
        print(f"| {name} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tables", nargs="+", default=["trainer", "objectives"])
    parser.add_argument("--cpu", action="store_true", help="CPU time of the process instead of the time that passes")
    options = parser.parse_args()
    steps, clock = options.steps, time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    student, teacher = vit(6, 128, 2), vit(12, 192, 3).eval()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % CLASSES} for i in range(BATCH * 50)]

    def ours(objectives, given=None, **more):
        arguments = settings(DistillationConfig, steps, objectives=objectives, **more)
        return DistillationTrainer(copy.deepcopy(student), arguments, teacher=given, train_dataset=data)

    def plain():
        return by_trainer(Trainer(copy.deepcopy(student), settings(TrainingArguments, steps), train_dataset=data))

    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {steps} steps", flush=True)
    if "trainer" in options.tables:
        times = interleave({"plain": plain(), "task": by_trainer(ours([{"name": "task"}]))}, clock=clock)
        rows = [("task, DistillationTrainer / Trainer", *ratio(times, "task", "plain"))]
        loops = {
            "hand": by_hand(copy.deepcopy(student), copy.deepcopy(teacher), data, steps),
            "logit_kd": by_trainer(ours(KD, copy.deepcopy(teacher))),
            "task": by_trainer(ours([{"name": "task"}])),
        }
        times = interleave(loops, clock=clock)
        rows.append(("logit_kd, DistillationTrainer / by hand", *ratio(times, "logit_kd", "hand")))
        rows.append(("task / logit_kd", *ratio(times, "task", "logit_kd")))
        times = interleave({"plain": plain(), "hand": by_hand(copy.deepcopy(student), None, data, steps)}, clock=clock)
        show([*rows, ("task, Trainer / by hand", *ratio(times, "plain", "hand"))])
    if "profile" in options.tables:
        loops = {
            "by hand": lambda: by_hand(copy.deepcopy(student), copy.deepcopy(teacher), data, steps),
            "logit_kd": lambda: by_trainer(ours(KD, copy.deepcopy(teacher))),
            "task by hand": lambda: by_hand(copy.deepcopy(student), None, data, steps),
            "Trainer": plain,
            "task": lambda: by_trainer(ours([{"name": "task"}])),
        }
        show_profile(loops, "logit_kd", "by hand")
        steps = min(steps, 12)  # the profiler keeps every operation
        show_operations({name: make() for name, make in loops.items()}, steps, WARM_UP)
    if "objectives" in options.tables:
        loops = {"logit_kd": by_trainer(ours(KD, copy.deepcopy(teacher)))}
        loops |= {name: by_trainer(ours([*KD, entry], copy.deepcopy(teacher))) for name, entry in BESIDE_KD.items()}
        loops["the usual way"] = the_usual_way(copy.deepcopy(student), copy.deepcopy(teacher), data, steps)
        times = interleave(loops)
        beside = [name for name in loops if name != "logit_kd"]
        show([(f"logit_kd + {name} / logit_kd", *ratio(times, name, "logit_kd")) for name in beside])
    if "transfer" in options.tables:
        task = [{"name": "task"}]
        loops = {"task": by_trainer(ours(task))}
        loops |= {name: by_trainer(ours([*task, entry])) for name, entry in TO_START.items()}
        loops["l2_sp, never_hurt"] = by_trainer(ours([*task, TO_START["l2_sp"]], gradient_rule=RULES["never_hurt"]))
        times = interleave(loops)
        rows = [(f"task + {name} / task", *ratio(times, name, "task")) for name in loops if name != "task"]
        loops = {"logit_kd": by_trainer(ours(KD, copy.deepcopy(teacher)))}
        loops |= {n: by_trainer(ours(KD, copy.deepcopy(teacher), gradient_rule=r)) for n, r in RULES.items()}
        times = interleave(loops)
        show(rows + [(f"logit_kd, {name} / logit_kd", *ratio(times, name, "logit_kd")) for name in RULES])
        paired = [{"name": "task"}, {"name": "attention_transfer"}]
        rules = {"sum": None, "layer_local": {"name": "layer_local"}}
        times = interleave(
            {n: by_trainer(ours(paired, copy.deepcopy(teacher), gradient_rule=r)) for n, r in rules.items()}
        )
        show([("task + attention_transfer, layer_local / their sum", *ratio(times, "layer_local", "sum"))])
    if "rates" in options.tables:
        loops = {"logit_kd": by_trainer(ours(KD, copy.deepcopy(teacher)))}
        loops["uniform"] = by_trainer(ours(KD, copy.deepcopy(teacher), layer_rates={"mode": "uniform"}))
        loops |= {n: by_trainer(ours(KD, copy.deepcopy(teacher), layer_rates=r)) for n, r in RATES.items()}
        mean_ratios(interleave(loops, WARM_UP), "logit_kd")


if __name__ == "__main__":
    main()
