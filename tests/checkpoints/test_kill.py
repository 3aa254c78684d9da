"""Runs that are killed again and again end with the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 36


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_as_if_it_never_was(tmp_path):
    command = [sys.executable, "-m", "tests.checkpoints.kill_worker", str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] >= 30 and report["inside_a_save"] >= 10 and all(report["by_kind"].values()), report
    assert report["resumed_when_finished"] >= report["chains"], report
    assert report["skipped"] >= 5 and report["damaged_afterwards"] >= 2, report
    assert report["different"] == []
