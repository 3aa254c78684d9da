"""Short training runs of `tune` and `probe`: each is a line of a file, and is not run again once it stands there."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common.experiment import Experiment
from hf_kdtl.commands.common.runs import untracked
from hf_kdtl.evaluation.results import same_value, to_json

RUNS = "runs.jsonl"
Curve = list[list[float]]
"""[[step, validation accuracy], ...]"""


class RunLog:
    """A file of JSON lines, one for each finished run: {"run": name, ...facts, ...what came out, "seconds": duration}.

    A last line that was cut off while it was written is dropped, and its run done again.

    Raises:
        ValueError: for a line in the middle that is not JSON.
    """

    def __init__(self, path: Path):
        self.path = path
        texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        if texts and not texts[-1].endswith("\n"):
            texts = texts[:-1]
            path.write_text("".join(texts), encoding="utf-8")
        self.lines: dict[str, dict[str, Any]] = {}
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line.") from error
            self.lines[line["run"]] = line

    @property
    def seconds(self) -> float:
        """Of all its runs."""
        return sum(line["seconds"] for line in self.lines.values())

    def once(self, name: str, facts: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of a run: as it stands in the file, or of `run()`, and then written.

        Raises:
            ValueError: where the file holds this run with other facts.
        """
        facts = to_json(facts)
        if (found := self.lines.get(name)) is not None:
            for key, value in facts.items():
                if not same_value(found.get(key), value):
                    raise ValueError(
                        f"{self.path} holds {name} with {key} {found.get(key)!r}, and it is now {value!r}. Set it "
                        "back, or start over with --overwrite_output_dir true --resume_from_checkpoint no."
                    )
            return found
        begun = time.perf_counter()
        outcome = run()
        line = {"run": name, **facts, **to_json(outcome), "seconds": round(time.perf_counter() - begun, 3)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[name] = line
        return line


class _Rungs(TrainerCallback):
    """Score validation after certain steps, and stop where `stop(step, accuracy)` says so."""

    def __init__(self, steps: Sequence[int], stop: Callable[[int, float], bool]):
        self.steps, self.stop = set(steps), stop
        self.curve: Curve = []

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step in self.steps
        return control

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        accuracy = float((metrics or {})["eval_accuracy"])
        self.curve.append([state.global_step, accuracy])
        if self.stop(state.global_step, accuracy):
            control.should_training_stop = True
        return control


def short_run(
    experiment: Experiment,
    arm: str,
    seed: int,
    config: DistillationConfig,
    at: Sequence[int],
    stop: Callable[[int, float], bool] = lambda step, accuracy: False,
) -> dict[str, Any]:
    """Train one arm, keeping nothing but {"curve": [[step, validation accuracy], ...]}, with the `weights` that were
    measured; or {"failed": why}.

    Args:
        config: with `max_steps`.
        at: the steps after which validation is scored.
        stop: whether to stop after such a step.
    """
    with tempfile.TemporaryDirectory() as folder, _without_notes():
        try:
            trainer = experiment.trainer(arm, seed, Path(folder), untracked(config))
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(rungs := _Rungs(at, stop))
            trainer.train()
        except (ValueError, FloatingPointError) as error:
            return {"curve": [], "failed": " ".join(str(error).split())}
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "stopped; the same command with --resume_from_checkpoint true continues after the last finished run."
            ) from None
    measured = trainer.auto_weights.weights
    return {"curve": rungs.curve} | ({"weights": measured} if measured else {})


@contextmanager
def _without_notes() -> Iterator[None]:
    """Nothing of what a trainer notes, which would be the same for each of many runs."""
    logger = logging.getLogger("hf_kdtl.trainer")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
