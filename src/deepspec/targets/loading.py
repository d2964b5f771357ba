"""Loading the model of a directory or a Hub id through transformers, with progress bars if it takes long."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from deepspec.errors import TargetError, first_line
from deepspec.log import progress
from deepspec.targets.hub import check_whole, unreadable
from deepspec.targets.spec import TargetSpec

LONG = 10**9
"""Bytes of weights from which loading shows a bar."""


def own_device() -> str:
    """The accelerator of this process, or cpu without one: under torchrun each process has its own."""
    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{int(local) % torch.cuda.device_count()}" if local else "cuda"


def load_model(spec: TargetSpec, path: str, dtype: str, device: str, device_map: Any) -> tuple[Any, Any]:
    """(the model of a directory or a Hub id, the device_map that placed it). Raises TargetError."""
    if device_map is None and spec.quantised:
        # Packed weights are often bound to where they were loaded: they cannot be moved afterwards.
        device_map = {"": device}
    if device_map is not None and find_spec("accelerate") is None:
        raise TargetError(
            f"transformers places the weights of {spec.name} itself (quantised, or `device_map`), and needs "
            "the accelerate package for it",
            next_step="pip install accelerate",
        )
    try:
        with loading_bars(path):
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                device_map=device_map,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ImportError as error:
        raise TargetError(
            f"transformers needs another package to load {spec.name}: {first_line(error)}",
            next_step="install what it names, or use a checkpoint that is not quantised",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise unreadable(spec.name, path, error, weights=True) from error
    check_whole(spec.name, path, info["missing_keys"])
    return model, device_map


@contextmanager
def loading_bars(path: str) -> Iterator[None]:
    """transformers' own progress bars if loading takes long (a download, or weights that take seconds to
    read), or plain lines if there is no terminal."""
    weights = [f for kind in ("*.safetensors", "*.bin") for f in Path(path).glob(kind) if f.is_file()]
    long = not Path(path).is_dir() or sum(f.stat().st_size for f in weights) > LONG
    usual = hf_logging.is_progress_bar_enabled()
    if not (long and sys.stderr.isatty()):
        hf_logging.disable_progress_bar()
    try:
        with nullcontext() if sys.stderr.isatty() else progress(f"loading {path}", None, count=False):
            yield
    finally:
        if usual:
            hf_logging.enable_progress_bar()
