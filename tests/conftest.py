"""Every test runs offline, on the CPU, in one thread, from a fixed seed, in a folder of its own."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", MPLBACKEND="Agg")
os.environ.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="module")
def _collect_little():
    """accelerate collects garbage before each run: not through all that was imported, or that other files left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    torch.default_generator.manual_seed(0)  # torch.manual_seed also keeps a stack for each accelerator there is not
    monkeypatch.chdir(tmp_path)
    logging.get_logger("transformers").warning_once.cache_clear()
