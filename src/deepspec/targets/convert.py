"""A GGUF target written as an ordinary Hugging Face directory, so that starts need not unpack it again."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils import logging as hf_logging

from deepspec.errors import TargetError, UserError
from deepspec.files import atomic_directory, check_writable
from deepspec.log import note
from deepspec.targets.gguf_file import find_gguf
from deepspec.targets.model import Target


def convert_target(name: str, out: Path, dtype: str = "auto") -> Target:
    """Write config, weights, tokenizer, chat template and generation config of a GGUF target, whole or not at
    all; dtype auto: float32, which holds every number of the file. Raises TargetError for another target,
    UserError if `out` holds something."""
    if find_gguf(name) is None:
        raise TargetError(
            f"{name} is not a GGUF file or a directory with one: there is nothing to convert",
            next_step="use it as --target as it is, or give a .gguf file",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "the output folder exists and is not empty", where=str(out), next_step="give --out a new folder"
        )
    check_writable(out, folder=True)
    target = Target.from_pretrained(name, dtype, "cpu")
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    for parameter in target.model.parameters():
        # Fused projections share their memory; a file has each on its own.
        parameter.data = parameter.data.contiguous()
    with atomic_directory(out) as part:
        target.model.save_pretrained(part)
        if target.tokenizer is not None:
            target.tokenizer.save_pretrained(part)
    if target.tokenizer is None:
        note(f"the file has no tokenizer: put the model's tokenizer files into {out}")
    elif not target.tokenizer.chat_template:
        note(f"the file has no chat template: put the model's chat_template.jinja into {out}")
    return target
