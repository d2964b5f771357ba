"""A stand-in for vLLM and SGLang that gives features on their wire formats, from a tiny target of its own.

It computes the streams without the code under test: `output_hidden_states` of transformers, and for the
stream before the final norm a hook in front of that norm. Files are written late, half first, under their
lock. What real servers do wrong, this one does when told to.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

Reply = tuple[int, dict[str, str], bytes]
COMPUTING = threading.Lock()


@cache
def loaded(target: Path, dtype: torch.dtype) -> Any:
    """A model of the stand-ins' own, which they share; one of them computes at a time."""
    return AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()


def every_stream(model: Any, ids: Sequence[int]) -> Tensor:
    """[T, n+1, d]: the stream after 0 (the embedding) to n layers, the last before the final norm."""
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


class StandIn:
    """One server. `streams` are vLLM's numbers; SGLang's --return-aux-hidden-state-layer-ids are one less."""

    def __init__(
        self, target: Path, storage: Path, streams: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = loaded(target, dtype)
        self.storage, self.streams = storage, list(streams)
        self.late = 0.02  # seconds between the answer and the file
        self.max_model_len = 256
        self.connector = True
        self.lock = True
        self.told_path: Callable[[Path], Path] = lambda path: path
        self.spoil: Callable[[Tensor, list[int]], tuple[Tensor, list[int]]] = lambda s, ids: (s, ids)
        self.unwritten = 0  # so many of the next files are given up
        self.faults: deque[Reply | None] = deque()  # None: the connection is closed without a word
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self._counting, self._names = threading.Lock(), 0
        handler = type("Handler", (_Handler,), {"standin": self})
        self._http = _Quiet(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    # ── what it answers ───────────────────────────────────────────────────────────────────────────

    def answer(self, route: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Reply | None:
        if route == "/v1/models":
            return _json({"data": [{"id": "served-name", "max_model_len": self.max_model_len}]})
        assert body is not None
        with self._counting:
            self.asked.append(body)
            self.headers.append(headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.faults:
                return self.faults.popleft()
            return self._vllm(body) if route == "/v1/completions" else self._sglang(route, body)
        finally:
            with self._counting:
                self.at_once -= 1

    def _given(self, ids: list[int]) -> tuple[Tensor, list[int]]:
        with COMPUTING:
            streams = every_stream(self.model, ids)[:, self.streams]
        return self.spoil(streams, ids)

    def _vllm(self, body: dict[str, Any]) -> Reply:
        if (body["model"], body["max_tokens"], body["return_token_ids"]) != ("served-name", 1, True):
            return _json({"error": f"not what a client should send: {body}"}, 404)
        if len(body["prompt"]) >= self.max_model_len:
            return _json({"error": {"message": "the prompt is longer than the context"}}, 400)
        answer: dict[str, Any] = {
            "choices": [{"prompt_token_ids": body["prompt"]}],
            "kv_transfer_params": None,
        }
        if self.connector:
            streams, ids = self._given(body["prompt"])
            with self._counting:
                self._names += 1
                path = self.storage / f"cmpl-{self._names}.safetensors"
                give_up, self.unwritten = self.unwritten > 0, self.unwritten - 1
            self._write(path, streams, ids, give_up)
            answer["kv_transfer_params"] = {"hidden_states_path": str(self.told_path(path))}
        return _json(answer)

    def _write(self, path: Path, streams: Tensor, ids: list[int], give_up: bool) -> None:
        """Take the lock now, and write in another thread, in two pieces, after the answer has gone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(f"{path}.lock" if self.lock else os.devnull, os.O_CREAT | os.O_WRONLY)
        if self.lock:
            fcntl.flock(handle, fcntl.LOCK_EX)
        content = save({"hidden_states": streams.contiguous(), "token_ids": torch.tensor(ids)})

        def later() -> None:
            half = len(content) // 2
            if not give_up:
                path.write_bytes(content[:half])
                time.sleep(self.late)
                path.write_bytes(content)
            os.close(handle)

        threading.Thread(target=later, daemon=True).start()

    def _sglang(self, route: str, body: dict[str, Any]) -> Reply:
        sampling = {"max_new_tokens": 1, "temperature": 0}
        if (
            route != "/generate"
            or body["sampling_params"] != sampling
            or body["return_hidden_states"] is not True
        ):
            return _json({"error": f"not what a client should send: {route} {body}"}, 404)
        if not self.connector:
            return _json({"error": {"message": "The server is not configured to return hidden states."}}, 400)
        streams, _ = self._given(body["input_ids"])
        return _json({"text": "", "meta_info": {"hidden_states": [streams.flatten(1).tolist()]}})


def _json(value: Any, status: int = 200) -> Reply:
    return status, {}, json.dumps(value).encode()


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that did not wait for its answer is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    standin: ClassVar[StandIn]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(self.standin.answer(self.path, None, dict(self.headers)))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(self.standin.answer(self.path, body, dict(self.headers)))

    def _send(self, reply: Reply | None) -> None:
        if reply is None:
            self.close_connection = True
            return
        status, headers, content = reply
        self.close_connection = "Connection" in headers
        head = {"Content-Length": str(len(content)), **headers}
        lines = [f"HTTP/1.1 {status} said", *(f"{k}: {v}" for k, v in head.items()), "", ""]
        # In one piece: two writes would wait for each other's acknowledgement.
        self.wfile.write("\r\n".join(lines).encode() + content)

    def log_message(self, *args: Any) -> None:
        pass
