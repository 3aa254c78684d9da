"""The private methods of Trainer that are overridden, and what each must still be. Fails when Trainer moves on."""

import inspect
import re

import pytest
import torch
from packaging.version import Version
from transformers import Trainer, TrainingArguments, __version__

from hf_kdtl import DistillationConfig, DistillationTrainer
from hf_kdtl.trainer.changes import ChangeableTrainer
from hf_kdtl.trainer.checkpointing import CheckpointingTrainer
from hf_kdtl.trainer.evaluation import EvaluatingTrainer
from hf_kdtl.trainer.loss import LossTrainer
from hf_kdtl.trainer.publishing import PublishingTrainer
from hf_kdtl.trainer.sharding import ShardingTrainer

# name -> (parameters that the override relies on, text that must still be in Trainer, why)
RELIED_ON = {
    "_prepare_for_training": (
        ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
        [
            "self.accelerator.prepare(self.model",
            "self.create_optimizer()\n\n",
            "model = self._wrap_model(self.model_wrapped)\n",
            "self.model_wrapped = model",
            "use_accelerator_prepare = model is self.model",
        ],
    ),
    "_wrap_model": (  # the first that is called after the optimizer was made, before self.model is prepared
        ["self", "model", "training", "dataloader"],
        ["keep_torch_compile=False) is not model:\n            return model"],
    ),
    "_get_num_items_in_batch": (["self", "batch_samples", "device"], ["num_items_in_batch"]),
    "get_batch_samples": (
        ["self", "epoch_iterator", "num_batches", "device"],
        ["self._get_num_items_in_batch(batch_samples, device)"],
    ),
    "compute_loss": (["self", "model", "inputs", "return_outputs", "num_items_in_batch"], ["compute_loss_func"]),
    "training_step": (  # what `separate_backward` does too, with two backward passes
        ["self", "model", "inputs", "num_items_in_batch"],
        [
            "self.model_accepts_loss_kwargs",
            "loss / self.current_gradient_accumulation_steps",
            "model.train()",
            "self.optimizer.train()",
            "inputs = self._prepare_inputs(inputs)",
            "with self.compute_loss_context_manager():",
            "self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)",
            "self.accelerator.backward(loss, **kwargs)",
            "return loss.detach()",
        ],
    ),
    "_prepare_inputs": (["self", "inputs"], ["inputs = self._prepare_input(inputs)"]),
    "get_eval_dataloader": (["self", "eval_dataset"], ["isinstance(eval_dataset, str)"]),
    "get_test_dataloader": (["self", "test_dataset"], ["dataset=test_dataset"]),
    "hyperparameter_search": (
        ["self", "hp_space", "compute_objective", "n_trials", "direction", "backend", "hp_name", "kwargs"],
        ["self.hp_space = "],
    ),
    "_hp_search_setup": (["self", "trial"], ["params = self.hp_space(trial)", "setattr(self.args, key, value)"]),
    "prediction_step": (
        ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
        ["self.compute_loss(", "self._get_num_items_in_batch([inputs]"],
    ),
    "evaluate": (  # what it logs is remembered with the dataset
        ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
        ["self.log(output.metrics)"],
    ),
    "evaluation_loop": (
        ["self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ["self.prediction_step("],
    ),
    "_get_dataloader": (
        ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        [
            "isinstance(dataset, datasets.Dataset)",
            "_get_collator_with_removed_columns(self.data_collator, description=",
        ],
    ),
    "_get_train_sampler": (["self", "train_dataset"], ["RandomSampler(train_dataset)"]),
    "_get_collator_with_removed_columns": (
        ["self", "data_collator", "description"],
        ["return data_collator", "return remove_columns_collator"],
    ),
    "create_optimizer": (["self", "model"], ["self.model if model is None else model"]),
    "_get_grad_norm": (["self", "model", "grad_norm"], ["clip_grad_norm_"]),
    "_load_from_checkpoint": (["self", "resume_from_checkpoint", "model"], ["load_state_dict(state_dict, False)"]),
    "_load_best_model": (["self"], ["load_state_dict(state_dict, False)"]),
    "save_model": (["self", "output_dir", "_internal_call"], ["self._save(output_dir)"]),
    "_load_optimizer_and_scheduler": (["self", "checkpoint"], ["self.optimizer.load_state_dict("]),
    "_init_training_state": (
        [
            "self",
            "max_steps",
            "num_update_steps_per_epoch",
            "num_train_epochs",
            "resume_from_checkpoint",
            "trial",
        ],
        ["return epochs_trained, steps_trained_in_current_epoch"],
    ),
    "_save": (["self", "output_dir", "state_dict"], ["save_pretrained(output_dir, state_dict=state_dict"]),
    "create_accelerator_and_postprocess": (["self"], ["self.accelerator = Accelerator(", "self.is_fsdp_enabled = "]),
    "_save_checkpoint": (
        ["self", "model", "trial"],
        [
            'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"',
            "if self.hp_search_backend is None and trial is None:\n            self.store_flos()",
            "if not self.args.save_only_model:\n            # Save optimizer",
            "self.state.best_model_checkpoint = best_checkpoint_dir",
            "if isinstance(cb, ExportableState)",
            "if self.args.push_to_hub:",
        ],
    ),
    "_save_optimizer_and_scheduler": (["self", "output_dir"], ["OPTIMIZER_NAME", "SCHEDULER_NAME"]),
    "_save_scaler": (["self", "output_dir"], ["self.accelerator.scaler", "SCALER_NAME"]),
    "_save_rng_state": (
        ["self", "output_dir"],
        ['"rng_state.pth"', 'f"rng_state_{self.args.process_index}.pth"'],
    ),
    "log": (["self", "logs", "start_time"], ["on_log"]),
    "init_hf_repo": (["self", "token", "private"], ["self.hub_model_id = ", "self.push_in_progress = None"]),
    "create_model_card": (
        [
            "self",
            "language",
            "license",
            "tags",
            "model_name",
            "finetuned_from",
            "tasks",
            "dataset_tags",
            "dataset",
            "dataset_args",
        ],
        ["README.md"],
    ),
    "push_to_hub": (
        ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"],
        ["self.save_model(_internal_call=True)", "on_push_begin", "self._finish_current_push()", "model_tags"],
    ),
    "_push_from_checkpoint": (["self", "checkpoint_folder"], ["HubStrategy.END", "hub_always_push", "on_push_begin"]),
}

# Parameters of ours that transformers 5.23 brought: an older Trainer, which is allowed too, does without.
NEWER = {"push_to_hub": ["private"], "init_hf_repo": ["private"]} if Version(__version__) < Version("5.23") else {}


@pytest.mark.parametrize("name", RELIED_ON)
def test_trainer_still_has_the_hook(name):
    parameters, texts = RELIED_ON[name]
    method = getattr(Trainer, name)
    assert list(inspect.signature(method).parameters) == [p for p in parameters if p not in NEWER.get(name, ())]
    source = inspect.getsource(method)
    for text in texts:
        assert text in source, f"Trainer.{name} changed: {text!r} is gone; look at DistillationTrainer.{name}"


def test_every_override_is_listed():
    kinds = (
        CheckpointingTrainer, PublishingTrainer, ShardingTrainer, EvaluatingTrainer, LossTrainer, ChangeableTrainer,
        DistillationTrainer,
    )  # fmt: skip
    members = {name: value for kind in kinds for name, value in vars(kind).items()}
    ours = {n for n, v in members.items() if inspect.isfunction(v) and hasattr(Trainer, n)}
    assert ours - {"__init__", "train"} <= RELIED_ON.keys()


def test_a_push_takes_what_trainer_takes_and_when_it_does():
    for name in ("push_to_hub", "create_model_card", "init_hf_repo"):
        ours = inspect.signature(getattr(PublishingTrainer, name)).parameters
        for parameter in inspect.signature(getattr(Trainer, name)).parameters.values():
            assert ours[parameter.name].default == parameter.default, (name, parameter)
    assert "if self.args.push_to_hub:\n            self.init_hf_repo()" in inspect.getsource(Trainer.__init__)
    assert "self._finish_current_push()" in inspect.getsource(Trainer._finalize_training)


def test_a_checkpoint_has_every_step_of_trainers():
    """CheckpointingTrainer._save_checkpoint does these in this order; a new one has to be added there."""
    calls = re.findall(r"self\.(\w+(?:\.save_to_json)?)\(", inspect.getsource(Trainer._save_checkpoint))
    order = ["store_flos", "_get_output_dir", "save_model", "_save_optimizer_and_scheduler", "_save_scaler"]
    assert calls == [*order, "_save_rng_state", "state.save_to_json", "_push_from_checkpoint"]


def test_inheritance_is_one_line():
    names = [kind.__name__ for kind in DistillationTrainer.__mro__]
    above = ["LossTrainer", "EvaluatingTrainer", "PublishingTrainer", "ShardingTrainer", "CheckpointingTrainer"]
    assert names == ["DistillationTrainer", "ChangeableTrainer", *above, "StreamingTrainer", "Trainer", "object"]
    assert all(len(kind.__bases__) == 1 for kind in DistillationTrainer.__mro__[:-1])


@pytest.mark.parametrize("kind", [DistillationTrainer, CheckpointingTrainer])
def test_the_constructor_takes_what_trainers_takes(kind):
    def listed(parameters):
        return [(p.name, p.kind, p.default) for p in parameters.values()]

    ours = dict(inspect.signature(kind.__init__).parameters)
    if kind is DistillationTrainer:
        teacher = ours.pop("teacher")
        assert (teacher.kind, teacher.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert listed(ours) == listed(inspect.signature(Trainer.__init__).parameters)


def test_the_constructor_passes_on_what_it_takes(tmp_path, monkeypatch):
    names = list(inspect.signature(Trainer.__init__).parameters)[1:]
    values: dict = {name: object() for name in names} | {"args": TrainingArguments(str(tmp_path))}
    given: dict = {}
    monkeypatch.setattr(Trainer, "__init__", lambda self, **keywords: given.update(keywords))
    CheckpointingTrainer(**values)
    assert given == values
    values |= {"args": DistillationConfig(str(tmp_path), objectives=[{"name": "task"}])}
    values |= {"model": torch.nn.Linear(1, 1), "train_dataset": [1], "eval_dataset": [1]}
    with pytest.raises(AttributeError):  # what follows needs what Trainer makes
        DistillationTrainer(**values)
    assert given == values
