"""The private methods of Trainer that are overridden, and what each must still be. Fails when Trainer moves on."""

import inspect

import pytest
from transformers import Trainer

from hf_kdtl import DistillationTrainer
from hf_kdtl.trainer.checkpointing import CheckpointingTrainer
from hf_kdtl.trainer.publishing import PublishingTrainer
from hf_kdtl.trainer.sharding import ShardingTrainer

# name -> (parameters that the override relies on, text that must still be in Trainer, why)
RELIED_ON = {
    "_prepare_for_training": (
        ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
        [
            "self.accelerator.prepare(self.model",
            "self.create_optimizer()",
            "self.model_wrapped = model",
            "use_accelerator_prepare = model is self.model",
        ],
    ),
    "_get_num_items_in_batch": (["self", "batch_samples", "device"], ["num_items_in_batch"]),
    "get_batch_samples": (
        ["self", "epoch_iterator", "num_batches", "device"],
        ["self._get_num_items_in_batch(batch_samples, device)"],
    ),
    "compute_loss": (["self", "model", "inputs", "return_outputs", "num_items_in_batch"], ["compute_loss_func"]),
    "training_step": (["self", "model", "inputs", "num_items_in_batch"], ["self.loss_is_scaled_for_ga is not None"]),
    "prediction_step": (
        ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
        ["self.compute_loss(", "self._get_num_items_in_batch([inputs]"],
    ),
    "evaluation_loop": (
        ["self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ["self.prediction_step("],
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
            "run_dir = self._get_output_dir(trial=trial)",
            "self.save_model(output_dir, _internal_call=True)",
            "if not self.args.save_only_model:\n            # Save optimizer",
            "save_total_limit=self.args.save_total_limit",
            "self.state.save_to_json(os.path.join(output_dir, TRAINER_STATE_NAME))",
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


@pytest.mark.parametrize("name", RELIED_ON)
def test_trainer_still_has_the_hook(name):
    parameters, texts = RELIED_ON[name]
    method = getattr(Trainer, name)
    assert list(inspect.signature(method).parameters) == parameters
    source = inspect.getsource(method)
    for text in texts:
        assert text in source, f"Trainer.{name} changed: {text!r} is gone; look at DistillationTrainer.{name}"


def test_every_override_is_listed():
    kinds = (CheckpointingTrainer, PublishingTrainer, ShardingTrainer, DistillationTrainer)
    members = {name: value for kind in kinds for name, value in vars(kind).items()}
    ours = {n for n, v in members.items() if inspect.isfunction(v) and hasattr(Trainer, n)}
    assert ours - {"__init__", "train"} <= RELIED_ON.keys()


def test_a_push_takes_what_trainer_takes_and_when_it_does():
    for name in ("push_to_hub", "create_model_card", "init_hf_repo"):
        ours = inspect.signature(getattr(PublishingTrainer, name)).parameters
        for parameter in inspect.signature(getattr(Trainer, name)).parameters.values():
            assert ours[parameter.name].default == parameter.default, (name, parameter)
    assert "if self.args.push_to_hub:\n            self.init_hf_repo()" in inspect.getsource(Trainer.__init__)
    assert "self._push_from_checkpoint(output_dir)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self._finish_current_push()" in inspect.getsource(Trainer._finalize_training)


def test_the_order_of_a_checkpoint_is_still_ours():
    source = inspect.getsource(Trainer._save_checkpoint)
    order = ["self.save_model(", "_save_optimizer_and_scheduler(", "_save_rng_state(", "save_to_json(", "rotate_che"]
    places = [source.index(text) for text in order]
    assert places == sorted(places), "trainer_state.json must be written after the rest and before rotation"
