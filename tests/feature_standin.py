"""A stand-in for vLLM that gives features in its format, from a tiny target of its own.

It computes hidden states without the code under test: `output_hidden_states` of transformers, and for the one
before the final norm a hook in front of that norm. Files are written late, half first, under their lock. What
real servers do wrong, this one does when told to.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from deepspec.targets import Target, TargetSpec
from standin import Refusal, StandIn

COMPUTING = threading.Lock()


@cache
def loaded(target: Path, dtype: torch.dtype) -> Any:
    """A model of the stand-ins' own, which they share; one of them computes at a time. Its weights lie in
    memory as those of a `Target`: another layout rounds in another way."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    return Target(TargetSpec.from_pretrained(str(target)), model).model


def every_state(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, n+1, d]: the hidden state after 0 (the embedding) to n layers, the last before the final norm."""
    caught: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    try:
        with torch.no_grad():
            hidden = model(
                torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False
            ).hidden_states
    finally:
        hook.remove()
    return torch.stack([*hidden[:-1], caught[0]], dim=2)[0]


class FeatureStandIn(StandIn):
    """One server of features; `layers` are vLLM's numbers of what it gives."""

    def __init__(
        self, target: Path, storage: Path, layers: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        self.weights = loaded(target, dtype)
        self.storage, self.layers = storage, list(layers)
        self.late = 0.02  # seconds between the answer and the file
        self.max_model_len = 256
        self.connector = True
        self.lock = True
        self.told_path: Callable[[Path], Path] = lambda path: path
        self.spoil: Callable[[Tensor, list[int]], tuple[Tensor, list[int]]] = lambda s, ids: (s, ids)
        self.unwritten = 0  # so many of the next files are given up
        self.faults: deque[str] = deque()  # what the next questions meet
        self._counting, self._names = threading.Lock(), 0
        super().__init__(lambda n: self.faults.popleft() if self.faults else None, model="served-name")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each question."""
        return [len(body["prompt"]) for _, body in self.asked]

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": self.model, "max_model_len": self.max_model_len}]}

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if (body["model"], body["max_tokens"], body["return_token_ids"]) != ("served-name", 1, True):
            raise Refusal(404, f"not what a client should send: {body}")
        if len(body["prompt"]) >= self.max_model_len:
            raise Refusal(400, "the prompt is longer than the context")
        answer: dict[str, Any] = {
            "choices": [{"prompt_token_ids": body["prompt"]}],
            "kv_transfer_params": None,
        }
        if self.connector:
            states, ids = self.given(body["prompt"])
            with self._counting:
                self._names += 1
                file = self.storage / f"cmpl-{self._names}.safetensors"
                give_up, self.unwritten = self.unwritten > 0, self.unwritten - 1
            self._write(file, states, ids, give_up)
            answer["kv_transfer_params"] = {"hidden_states_path": str(self.told_path(file))}
        return answer

    def given(self, ids: list[int]) -> tuple[Tensor, list[int]]:
        with COMPUTING:
            states = every_state(self.weights, ids)[:, self.layers]
        return self.spoil(states, ids)

    def _write(self, path: Path, states: Tensor, ids: list[int], give_up: bool) -> None:
        """Take the lock now, and write in another thread, in two pieces, after the answer has gone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(f"{path}.lock" if self.lock else os.devnull, os.O_CREAT | os.O_WRONLY)
        if self.lock:
            fcntl.flock(handle, fcntl.LOCK_EX)
        content = save({"hidden_states": states.contiguous(), "token_ids": torch.tensor(ids)})

        def later() -> None:
            half = len(content) // 2
            if not give_up:
                path.write_bytes(content[:half])
                time.sleep(self.late)
                path.write_bytes(content)
            os.close(handle)

        threading.Thread(target=later, daemon=True).start()
