"""The functions by which a checkpoint's files are written."""

import torch
import transformers.modeling_utils
from transformers.trainer_callback import TrainerState

import hf_kdtl.checkpoints.state


def wrap_writers(wrapped):
    """Put `wrapped(function, place of the path among its arguments)` in the place of each."""
    torch.save = wrapped(torch.save, 1)
    transformers.modeling_utils.safe_save_file = wrapped(transformers.modeling_utils.safe_save_file, 1)
    hf_kdtl.checkpoints.state.save_file = wrapped(hf_kdtl.checkpoints.state.save_file, 1)
    TrainerState.save_to_json = wrapped(TrainerState.save_to_json, 1)
