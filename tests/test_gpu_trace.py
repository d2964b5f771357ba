"""The training step on a pretended CUDA device (`benchmarks/gpu_trace.py`), at tiny dimensions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_trace.py"


@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended device is compiled with g++")
def test_step_mixes_no_devices_never_waits_and_takes_the_memory_of_its_plan():
    """A mix of devices raises in the script, which runs on its own: its device is registered before torch."""
    command = [sys.executable, str(SCRIPT), "--tiny", "--length", "256", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert set(report) == {"dspark", "dflash", "eagle3"}
    for algorithm, found in report.items():
        assert found["waits"] == 0, (algorithm, found["about"]["waits"])
        assert 0.3 * found["planned, GB"] < found["peak, GB"] <= found["planned, GB"], algorithm
        assert found["TFLOP"] > 0
