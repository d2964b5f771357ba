"""The training step on a pretended CUDA device (`benchmarks/gpu_trace.py`), at tiny dimensions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from deepspec.drafts import ALGORITHMS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_trace.py"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the pretended device is compiled with g++"
)
pytestmark = needs_compiler


def report_of(algorithms: Iterable[str], *words: str) -> dict[str, Any]:
    """What the script prints. It runs on its own: its device is registered before torch."""
    command = [sys.executable, str(SCRIPT), *algorithms, *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert set(report) == set(algorithms)
    return dict(report)


def test_step_mixes_no_devices_never_waits_and_takes_the_memory_of_its_plan():
    """A mix of devices raises in the script."""
    for algorithm, found in report_of(ALGORITHMS, "--tiny", "--length", "256").items():
        assert found["waits"] == 0, (algorithm, found["about"]["waits"])
        assert 0.85 * found["planned, GB"] < found["peak, GB"] <= found["planned, GB"], algorithm
        assert found["TFLOP"] > 0


def test_round_of_ragged_rows_waits_for_its_proposals_and_its_verdict_only():
    """Indices and random numbers are sent from pinned pages; nothing is asked for layer by layer."""
    for algorithm, found in report_of(ALGORITHMS, "--round", "6").items():
        places = [(what.partition(":")[0], count) for what, count in found["waits"].items()]
        assert places == [("tolist", 1), ("tolist", 1)], (algorithm, found["waits"])
        assert found["kernels"] > 200, algorithm
