"""The real huggingface_hub client, pointed at the loopback Hub: in this process, or in one of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

from tests.hub.server import TOKEN, Hub

ROOT = Path(__file__).parents[2]


def in_hub(hub: Hub, code: str | list[str], home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run code, or a program by its arguments, as a user of the Hub with a new home folder and the default token."""
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "1"}
    own |= {"HF_HOME": str(home / "hf"), "HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code] if isinstance(code, str) else [sys.executable, *code]
    return subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A Hub that the client in this process talks to, logged in as its user, without waiting between its retries.

    HF_ENDPOINT is read when huggingface_hub is imported, so the constants are set instead.
    """
    with Hub() as server:
        settings = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings |= {"HF_HUB_CACHE": str(tmp_path / "hub_cache"), "HF_TOKEN_PATH": str(tmp_path / "no_token")}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
